"""Memory that runs out: one error that says in which stage, what to change, and what is kept."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eigenslice.errors import EigensliceError, MemoryRanOutError, first_line
from eigenslice.runtime.output import partial_path

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
HUGE = ("storage size calculation overflowed", "invalid buffer size", "numel: integer multiplication overflow")
"""Parts of torch's messages, in lower case, for memory that ran out or could never be enough."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory of a device or of the host ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError | ValueError) and not isinstance(error, EigensliceError)
    return said and any(text in str(error).lower() for text in (*NO_MEMORY, *HUGE))


@contextmanager
def memory_errors(
    progress: Callable[..., None], advice: Callable[[str], str], output: Path | None = None
) -> Iterator[Callable[..., None]]:
    """Give a progress that remembers its stage, and tell where memory ran out in the body.

    Args:
        progress: Called as the work goes on.
        advice: Function that takes the stage, and says what to change.
        output: The folder that the body makes in a work folder, whose state may be kept; None if there is none.

    Raises:
        MemoryRanOutError: memory of a device or of the host ran out.
    """
    last: list[Any] = ["loading", 0, 0]

    def watched(stage: str, done: int, total: int, *tokens: int) -> None:
        last[:] = stage, done, total
        progress(stage, done, total, *tokens)

    try:
        yield watched
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        stage, done, total = last
        reached = f", {done} of {total}" if total else ""
        raise MemoryRanOutError(
            f"memory ran out in stage {stage}{reached} ({first_line(error)})",
            allowed="work that fits into the memory of the device and of the host",
            next_step=advice(stage) + _kept(output),
        ) from error


def _kept(output: Path | None) -> str:
    """Return what is kept of a run, as the end of a sentence."""
    if output is None:
        return ""
    partial = partial_path(output)
    if not partial.exists():
        return "; nothing was written"
    return f"; {partial} keeps what is done, and the same command with --resume goes on from there"
