"""The progress of a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import torch

MIB = 1024**2


class Progress(Protocol):
    """Called as the work goes on."""

    def __call__(self, stage: str, done: int, total: int, tokens: int = 0) -> None:
        """Report the name of a stage, its finished and total steps, and the tokens that pass all steps, if known."""
        ...


def no_progress(stage: str, done: int, total: int, tokens: int = 0) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Pace:
    """The pace of a stage.

    Attributes:
        stage, done, total: Arguments of the last call of `Progress`.
        tokens_per_second: Tokens through all steps of the stage; None if unknown.
        seconds_left: Time left of this stage; None if unknown.
        memory: Resident memory of this process, in bytes.
        device_memory: Memory of the GPU in use by this process's tensors, in bytes; 0 without one.
    """

    stage: str
    done: int
    total: int
    tokens_per_second: float | None
    seconds_left: float | None
    memory: int
    device_memory: int

    def __str__(self) -> str:
        parts = [f"{self.stage} {self.done}/{self.total}"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{self.memory / MIB:,.0f} MiB")
        if self.device_memory:
            parts.append(f"{self.device_memory / MIB:,.0f} MiB on the GPU")
        if self.seconds_left is not None and self.done < self.total:
            parts.append(f"{self.seconds_left:.0f} s left")
        return ", ".join(parts)


@dataclass
class Pacer:
    """The pace of a run, from calls of `Progress`. A resumed stage begins in its middle."""

    clock: Callable[[], float] = time.monotonic
    _begun: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, stage: str, done: int, total: int, tokens: int = 0) -> Pace:
        now = self.clock()
        start, first = self._begun.setdefault(stage, (now, done))
        steps, seconds = done - first, now - start
        known = steps > 0 and seconds > 0
        device_memory = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        return Pace(
            stage,
            done,
            total,
            tokens * steps / total / seconds if known and tokens else None,
            (total - done) * seconds / steps if known else None,
            psutil.Process().memory_info().rss,
            device_memory,
        )
