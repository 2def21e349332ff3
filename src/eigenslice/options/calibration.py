"""Options of calibration and evaluation text."""

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.ranges import SEED, check_ranges

MOST_SAMPLES = 10**9
LONGEST = 10**8
"""Sequences, and tokens in each; no model and no text has more."""


class CalibrationOptions(BaseModel):
    """Which tokens the covariances are collected on, or a perplexity is measured on.

    Attributes:
        data: A preset's name, a file, or a hub data set as NAME[:CONFIG[:SPLIT]]; several are mixed in equal shares.
            A tuple, once validated.
        field: Name of the text field of records, or of the tensor in a safetensors file. For several texts, either
            one, for all that aren't presets, or one for each ("" for none). A tuple, once validated.
        samples: Number of sequences, of all sources together.
        seqlen: Tokens per sequence.
        seed: Seed of the sampling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | tuple[str, ...] = ("mixed",)
    field: str | tuple[str, ...] | None = ()
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

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
        if not (1 <= self.samples <= MOST_SAMPLES and 2 <= self.seqlen <= LONGEST):
            raise OptionsError(
                f"--samples {self.samples} --seqlen {self.seqlen}",
                allowed=f"1 to {MOST_SAMPLES} sequences of 2 to {LONGEST} tokens",
                next_step="correct them; the paper uses 1024 sequences of 2048 tokens, 128 go a long way",
            )
        check_ranges(self, {"seed": SEED})
        return self
