"""Options of `eigenslice bench`."""

import shutil
from typing import Annotated

from pydantic import model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.common import LONGEST, SEED, Device, RunDtype, TrustCheckpoints
from eigenslice.options.flags import MACHINE, WORK, Option, Options, Range

TOKENS = Range(2, LONGEST, f"2 to {LONGEST} tokens")


class BenchOptions(Options):
    """Options of timing models. `seed` is the seed of the prompt's tokens, which are random."""

    prompt: Annotated[int, Option("Tokens per sequence that are read at once.", WORK), TOKENS] = 512
    new: Annotated[int, Option("Tokens per sequence that are generated.", WORK), TOKENS] = 64
    batch: Annotated[int, Option("Sequences at once.", WORK), Range(1, 10**6, "1 to 1000000 sequences")] = 1
    runs: Annotated[
        int,
        Option("Timed runs of each model, interleaved, after one that isn't timed.", WORK),
        Range(1, 10**6, "1 to 1000000"),
    ] = 5
    static_cache: Annotated[bool, Option("Use a cache of fixed length.", MACHINE)] = False
    compile: Annotated[bool, Option("Use torch.compile (with a static cache).", MACHINE)] = False
    memory: Annotated[bool, Option("Measure peak memory; on CPU this loads each model again.", MACHINE)] = True
    device: Device = None
    dtype: RunDtype = None
    seed: Annotated[int, SEED] = 0
    trust_remote_code: TrustCheckpoints = False

    @model_validator(mode="after")
    def _check(self) -> "BenchOptions":
        if self.compile and shutil.which("c++") is None and shutil.which("g++") is None:
            raise OptionsError(
                "--compile, and there is no C++ compiler",
                allowed="torch.compile needs g++ or another c++",
                next_step="install one, or leave --compile out",
            )
        return self

    @property
    def static(self) -> bool:
        """True if the cache has a fixed length."""
        return self.static_cache or self.compile
