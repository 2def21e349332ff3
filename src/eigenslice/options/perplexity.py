"""Options of `eigenslice eval` without tasks."""

from typing import Annotated

from eigenslice.options.calibration import CalibrationOptions
from eigenslice.options.common import Device, RunDtype, TrustCheckpoint
from eigenslice.options.flags import TEXT, Nested, Option, Options

TEXT_TO_PREDICT: dict[str, Option | None] = {
    "data": Option(
        "Text to predict: builtin, wikitext2, c4, alpaca, ptb, fineweb-edu, tinystories, code (their held-out "
        "parts), mixed (one after another), a file (as slice's --calibration), or a hub data set "
        "NAME[:CONFIG[:SPLIT]]. Several: a perplexity for each.",
        TEXT,
    ),
    "field": Option(
        "Text field of records or tensor of a file, as slice's --field; once, or once for each text.",
        TEXT,
        "text, or else a conversation",
    ),
    "samples": Option("Windows of each text, from its start.", TEXT),
    "seqlen": Option("Tokens per window.", TEXT),
}


class PerplexityOptions(Options):
    """Text to predict, and how models run on it."""

    text: Annotated[CalibrationOptions, Nested(TEXT_TO_PREDICT)] = CalibrationOptions(data="wikitext2")
    device: Device = None
    dtype: RunDtype = None
    trust_remote_code: TrustCheckpoint = False
