"""Options of `eigenslice sample`."""

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration import LONGEST, MOST_SAMPLES
from eigenslice.options.common import DtypeName
from eigenslice.options.paths import UserPath
from eigenslice.options.ranges import SEED, Limits, check_ranges

MOST_TOKENS = 10**9
LIMITS: Limits = {
    "samples": (1, MOST_SAMPLES, f"1 to {MOST_SAMPLES} texts"),
    "seqlen": (2, LONGEST, f"2 to {LONGEST} tokens"),
    "batch": (1, 10**6, "1 to 1000000 texts"),
    "temperature": (1e-4, 1e4, "0.0001 to 10000; 1 is what the model is"),
    "seed": SEED,
}


class SampleOptions(BaseModel):
    """What to write.

    Attributes:
        model: A folder, a hub id or a .gguf file. It is loaded as a whole.
        output: A .json file, a list of strings, as `slice --calibration` takes it; must not exist.
        samples: Number of texts.
        seqlen: Tokens of each.
        batch: Texts at once.
        temperature: What logits are divided by; at 1, tokens are drawn as the model predicts them.
        seed: Of the beginnings and of the drawing.
        device: torch device; None is a GPU if there is one.
        dtype: None is the stored one on a GPU and float32 on CPU.
        trust_remote_code: Let the checkpoint run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: UserPath
    samples: int = 64
    seqlen: int = 1024
    batch: int = 32
    temperature: float = 1.0
    seed: int = 0
    device: str | None = None
    dtype: DtypeName | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "SampleOptions":
        check_ranges(self, LIMITS)
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
