"""Options of `eigenslice sample`."""

from typing import Annotated

from pydantic import model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration_text import MOST_SAMPLES
from eigenslice.options.common import LONGEST, SEED, Device, RunDtype, TrustCheckpoint
from eigenslice.options.flags import MACHINE, TEXT, Option, Options, Range
from eigenslice.options.paths import UserPath

MOST_TOKENS = 10**9


class SampleOptions(Options):
    """Text for a model to write. The model is loaded as a whole."""

    model: Annotated[str, Option("The dense model: a folder, a hub id or a .gguf file.", argument=True)]
    output: Annotated[UserPath, Option(".json file to write; must not exist.", flags=("--output", "-o"))]
    samples: Annotated[int, Option("Texts to write.", TEXT), Range(1, MOST_SAMPLES, f"1 to {MOST_SAMPLES} texts")] = 64
    seqlen: Annotated[int, Option("Tokens of each text.", TEXT), Range(2, LONGEST, f"2 to {LONGEST} tokens")] = 1024
    batch: Annotated[int, Option("Texts at once.", MACHINE), Range(1, 10**6, "1 to 1000000 texts")] = 32
    temperature: Annotated[
        float,
        Option("Divisor of the logits; 1 draws tokens as the model predicts them.", TEXT),
        Range(1e-4, 1e4, "0.0001 to 10000; 1 is what the model is"),
    ] = 1.0
    seed: Annotated[int, Option("Seed of the beginnings and of the drawing.", TEXT), SEED] = 0
    device: Device = None
    dtype: RunDtype = None
    trust_remote_code: TrustCheckpoint = False

    @model_validator(mode="after")
    def _check(self) -> "SampleOptions":
        if self.samples * self.seqlen > MOST_TOKENS:
            raise OptionsError(
                f"--samples {self.samples} --seqlen {self.seqlen}",
                allowed=f"at most {MOST_TOKENS} tokens together: they are held in memory",
                next_step="lower one of them",
            )
        if self.output.suffix != ".json":
            raise OptionsError(
                f"--output {self.output}", allowed="a .json file", next_step=f"write to {self.output}.json"
            )
        return self
