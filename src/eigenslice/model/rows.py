"""A matrix with a row for each token, read a few thousand rows at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.runtime.device import moved

ROWS = 4096
"""Rows of an embedding or a head that are in float64 at once."""


@dataclass(frozen=True)
class Rows:
    """A matrix with a row for each token, read and changed a few thousand rows at a time.

    Attributes:
        pieces: Function that reads the matrix, (n, D) at a time, as the checkpoint has it.
        count: Number of rows.
        device: The device of the changes, in float64.
        changes: Functions from rows (n, D) to rows (n, D), one after the other.
    """

    pieces: Callable[[], Iterable[Tensor]]
    count: int
    device: torch.device
    changes: tuple[Callable[[Tensor], Tensor], ...] = ()

    def map(self, then: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """All rows, changed by `changes` and then by `then`, from (n, D) to (n, m); (V, m) of a dtype on the device."""
        result, start = torch.empty(0), 0
        for piece in self.pieces():
            rows = moved(piece, self.device, torch.float64)
            for change in self.changes:
                rows = change(rows)
            made = then(rows)
            if start == 0:
                result = torch.empty(self.count, made.shape[1], dtype=dtype, device=self.device)
            result[start : start + len(made)] = made
            start += len(made)
        return result

    def to(self, dtype: torch.dtype) -> Tensor:
        """All rows, changed."""
        return self.map(lambda rows: rows, dtype)
