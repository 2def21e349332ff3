"""Second moments of the residual stream."""

import torch
from torch import Tensor


def normalize(x: Tensor, eps: float) -> Tensor:
    """RMSN(x) = x / sqrt(mean(x^2) + eps), over the last axis, in at least float32 (SliceGPT, section 3)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class SecondMoment:
    """Sum of x^T x over tokens, kept in float64.

    The product of each chunk is taken in float32, where it is exact enough for one chunk's few thousand tokens,
    and the chunks are added in float64: with a float32 sum, the small eigenvectors drown (section 4 of the paper
    reports the loss).
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add a chunk of tokens, (tokens, D)."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.matrix += (rows.T @ rows).to(torch.float64)
        self.tokens += rows.shape[0]
