"""What can be chosen for a benchmark."""

import shutil

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration import LONGEST
from eigenslice.options.common import DtypeName
from eigenslice.options.ranges import SEED, Limits, check_ranges

LIMITS: Limits = {
    "prompt": (2, LONGEST, f"2 to {LONGEST} tokens"),
    "new": (2, LONGEST, f"2 to {LONGEST} tokens"),
    "batch": (1, 10**6, "1 to 1000000 sequences"),
    "runs": (1, 10**6, "1 to 1000000"),
    "seed": SEED,
}


class BenchOptions(BaseModel):
    """How models are timed.

    Attributes:
        prompt: Tokens per sequence that are read at once.
        new: Tokens per sequence that are generated after them.
        batch: Sequences at once.
        runs: Timed runs of each model, interleaved, after one that isn't timed.
        static_cache: A cache of fixed length instead of one that grows.
        compile: torch.compile, with a static cache.
        memory: Measure peak memory (on CPU in a process for each model, which loads it again).
        device: torch device; None is a GPU if there is one.
        dtype: None is the stored one on a GPU and float32 on CPU.
        seed: Of the prompt's tokens, which are random.
        trust_remote_code: Let the checkpoints run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: int = 512
    new: int = 64
    batch: int = 1
    runs: int = 5
    static_cache: bool = False
    compile: bool = False
    memory: bool = True
    device: str | None = None
    dtype: DtypeName | None = None
    seed: int = 0
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "BenchOptions":
        check_ranges(self, LIMITS)
        if self.compile and shutil.which("c++") is None and shutil.which("g++") is None:
            raise OptionsError(
                "--compile, and there is no C++ compiler",
                allowed="torch.compile needs g++ or another c++",
                next_step="install one, or leave --compile out",
            )
        return self

    @property
    def static(self) -> bool:
        """Whether the cache has a fixed length."""
        return self.static_cache or self.compile
