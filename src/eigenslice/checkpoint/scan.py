"""One pass over a weight file: its SHA-256, and how large the numbers in each tensor are."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from eigenslice.errors import CheckpointError

PIECE = 2**24
"""Bytes that are read at once, or one row where a row has more."""


@dataclass(frozen=True)
class Span:
    """The bytes of a tensor in its file.

    Attributes:
        name, shape: The tensor's.
        start, size: Its place, in bytes.
        unit: Number of bytes that can be decoded alone.
        decode: Function from bytes to numbers.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    unit: int
    decode: Callable[[memoryview], Tensor]


@dataclass(frozen=True)
class Extent:
    """The numbers of a tensor.

    Attributes:
        shape: The tensor's.
        largest: The largest absolute value.
        broken: Where the first NaN or infinite number is, counted over all numbers; None if there is none.
    """

    shape: tuple[int, ...]
    largest: float
    broken: int | None

    @property
    def position(self) -> list[int]:
        """Row, column and so on of the broken number."""
        return [int(i) for i in np.unravel_index(self.broken or 0, self.shape or (1,))]


def plain(dtype: torch.dtype) -> Callable[[memoryview], Tensor]:
    """Decodes numbers that are stored as they are."""
    return lambda data: torch.frombuffer(data, dtype=dtype)


def scan(
    path: Path, spans: Iterable[Span], seen: Callable[[int], None] = lambda count: None
) -> tuple[str, dict[str, Extent]]:
    """The SHA-256 of a file, and the extent of each of these tensors in it; the file is read once, piece by piece.

    Args:
        path: The file.
        spans: The places of the tensors.
        seen: Function that is called with the number of bytes read, after each tensor.

    Raises:
        OSError: it can't be read.
    """
    digest, extents = hashlib.sha256(), {}
    with path.open("rb") as file:
        for span in sorted(spans, key=lambda s: s.start):
            _skip(file, digest, span.start - file.tell())
            extents[span.name] = _extent(file, digest, span)
            seen(file.tell())
        _skip(file, digest, None)
    return digest.hexdigest(), extents


def _skip(file: IO[bytes], digest: Any, count: int | None) -> None:
    """Hash so many bytes, or all that are left."""
    while (count is None or count > 0) and (piece := file.read(PIECE if count is None else min(PIECE, count))):
        digest.update(piece)
        count = count if count is None else count - len(piece)


def _extent(file: Any, digest: Any, span: Span) -> Extent:
    """Hash a tensor's bytes, and look at its numbers."""
    length = max(1, PIECE // span.unit) * span.unit
    left, seen, largest = span.size, 0, 0.0
    broken = None
    buffer = bytearray(min(length, left))
    while left > 0:
        view = memoryview(buffer)[: min(length, left)]
        count = file.readinto(view)
        digest.update(view[:count])
        if count < len(view):
            raise OSError(f"it ends within {span.name}")
        numbers = span.decode(view)
        if broken is None and numbers.numel():
            low, high = (float(end) for end in numbers.aminmax())  # NaN where there is one
            largest = max(largest, abs(low), abs(high))
            if not math.isfinite(low) or not math.isfinite(high):
                broken = seen + int((~numbers.flatten().isfinite()).nonzero()[0])
        left, seen = left - count, seen + numbers.numel()
    return Extent(span.shape, largest, broken)


def refuse_unfit(name: str, extents: dict[str, Extent], dtype: torch.dtype | None) -> None:
    """Refuse tensors with NaN or infinite numbers, or with larger numbers than a dtype has.

    Args:
        name: The checkpoint's name, for messages.
        extents: Extents by the tensors' names.
        dtype: The dtype that all numbers must fit into; None is the stored dtype.

    Raises:
        CheckpointError: a tensor has such a number.
    """
    for tensor, extent in extents.items():
        if extent.broken is not None:
            raise CheckpointError(
                f"{name}: {tensor} holds NaN or infinite numbers, the first one at {extent.position}",
                allowed="finite weights",
                next_step="download the checkpoint again; if it was trained so, take an earlier one",
            )
        if dtype is not None and extent.largest > torch.finfo(dtype).max:
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name}: {tensor} holds numbers up to {extent.largest:.3g}, which {kind} can't hold",
                allowed=f"weights up to {torch.finfo(dtype).max:.3g}, or another dtype",
                next_step="run with --compute-dtype float32 or bfloat16",
            )
