"""Options of calibration and evaluation text."""

from typing import Annotated

from pydantic import field_validator, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.common import LONGEST, SEED
from eigenslice.options.flags import CALIBRATION, Option, Options, Range

MOST_SAMPLES = 10**9
"""Sequences; no text has more."""
USUAL = "correct it; the paper uses 1024 sequences of 2048 tokens, 128 go a long way"


class CalibrationOptions(Options):
    """Text to collect covariances on, or to measure a perplexity on.

    `data` and `field` are tuples, once validated.
    """

    data: Annotated[
        str | tuple[str, ...],
        Option(
            "Text to find the basis on: mixed (wikitext2, fineweb-edu, tinystories, alpaca and code), one of "
            "these, c4, ptb, builtin, a file (text, .json, .jsonl, .csv, .parquet, also compressed; .safetensors "
            "with token ids), or a hub data set NAME[:CONFIG[:SPLIT]]. Conversations are in the model's chat "
            "template. Several: equal shares of each.",
            CALIBRATION,
            flags=("--calibration",),
        ),
    ] = ("mixed",)
    field: Annotated[
        str | tuple[str, ...] | None,
        Option(
            "Text field of records (several: a,b), or tensor of a .safetensors; once, or once for each text "
            '("" for a preset).',
            CALIBRATION,
            "text, or else a conversation",
        ),
    ] = ()
    samples: Annotated[
        int,
        Option("Calibration sequences, of all texts together.", CALIBRATION),
        Range(1, MOST_SAMPLES, f"1 to {MOST_SAMPLES} sequences", USUAL),
    ] = 128
    seqlen: Annotated[
        int,
        Option("Tokens per calibration sequence.", CALIBRATION),
        Range(2, LONGEST, f"2 to {LONGEST} tokens", USUAL),
    ] = 2048
    seed: Annotated[int, Option("Seed of the sampling.", CALIBRATION), SEED] = 0

    @field_validator("data", "field", mode="after")
    @classmethod
    def _as_tuple(cls, value: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else value or ()

    @model_validator(mode="after")
    def _check(self) -> "CalibrationOptions":
        if not self.data:
            raise OptionsError(
                "no text was named",
                allowed="one --calibration or more",
                next_step="leave the option out for the default, or name a preset or a file",
            )
        if len(self.field or ()) not in (0, 1, len(self.data)):
            raise OptionsError(
                f"{len(self.field or ())} times --field for {len(self.data)} texts",
                allowed="none, one for all texts that need one, or one for each",
                next_step="repeat --field in the order of the texts; an empty one ('') is for a text that needs none",
            )
        return self
