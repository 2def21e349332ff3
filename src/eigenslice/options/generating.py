"""Options of `eigenslice eval --generate`."""

from typing import Annotated

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.common import LONGEST, SEED, Device, RunDtype, TrustCheckpoint
from eigenslice.options.evaluation import TEXT_TO_PREDICT
from eigenslice.options.flags import WRITING, Nested, Option, Options, Range

PROMPT_TEXTS: dict[str, Option | None] = {
    "data": Option(
        "Instead of perplexity: let the models go on from prompts. builtin (24 everyday beginnings), or a text as "
        "--data, of which each line or record is a prompt. Several: all of them.",
        WRITING,
        "no text",
        flags=("--generate",),
    ),
    "field": TEXT_TO_PREDICT["field"],
}


class GenerationOptions(Options):
    """Prompts, and the text that models write after them."""

    text: Annotated[CalibrationOptions, Nested(PROMPT_TEXTS)] = CalibrationOptions(data="builtin")
    prompts: Annotated[
        int,
        Option("Prompts of each text, from its start.", WRITING),
        Range(1, 10**6, "1 to 1000000 prompts"),
    ] = 32
    prompt_tokens: Annotated[
        int,
        Option("Tokens of a prompt, from its start.", WRITING),
        Range(1, LONGEST, f"1 to {LONGEST} tokens"),
    ] = 32
    new: Annotated[
        int, Option("Tokens to write after each prompt.", WRITING), Range(1, LONGEST, f"1 to {LONGEST} tokens")
    ] = 64
    seed: Annotated[int, Option("Seed of the sampling.", WRITING), SEED] = 0
    device: Device = None
    dtype: RunDtype = None
    trust_remote_code: TrustCheckpoint = False
