"""Second moments of the residual stream."""

from itertools import pairwise

import torch
from torch import Tensor

STRIPS = 6
STRIP = 64  # columns; narrower strips are not worth it
CHUNK = 4096
"""Tokens that a product sums in float32; sums of more tokens are sums of such chunks in float64."""


def normalize(x: Tensor, eps: float) -> Tensor:
    """RMSN(x) = x / sqrt(mean(x^2) + eps), over the last axis, in at least float32 (SliceGPT, section 3)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * inverse_size(wide, eps)).to(x.dtype)


def inverse_size(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays, of size 1.

    That is how much an error in a token counts: the next norm divides by the stream's size.
    """
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add A^T A of rows A (T, n) to a float64 sum (n, n), in place.

    The product of a chunk is taken in the dtype of the rows, and chunks are added in float64. In a float32 sum over all
    tokens, the small eigenvectors drown; section 4 of the paper reports the loss.
    """
    for chunk in rows.split(CHUNK):
        _add_strips(total, chunk)


def _add_strips(total: Tensor, rows: Tensor) -> None:
    """Add A^T A of rows A (T, n) to a sum (n, n), in place.

    The sum is made strip by strip, so that a product takes little memory. The part below the diagonal isn't multiplied.
    """
    n = rows.shape[1]
    strips = STRIPS if n >= STRIPS * STRIP else 1
    for start, end in pairwise(n * strip // strips for strip in range(strips + 1)):
        product = rows[:, start:end].T @ rows[:, start:]
        total[start:end, start:] += product
        total[end:, start:end] += product[:, end - start :].T


def add_cross(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add A^T B of rows A (T, n) and B (T, m) to a sum (n, m), in place, chunk by chunk as `add_gram` does."""
    for a, b in zip(left.split(CHUNK), right.split(CHUNK), strict=True):
        total += a.T @ b


class SecondMoment:
    """Sum of x^T x over tokens, kept in float64; products are taken in at least float32."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add a chunk of tokens, (tokens, D)."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        add_gram(self.matrix, rows)
        self.tokens += rows.shape[0]
