"""Solving in float32 where the condition allows it."""

import torch
from torch import Tensor

LARGEST_CONDITION = 2.0**15
"""Largest condition for float32. Its rounding, 2^-24, then changes a solution by at most about 2^-9 of itself, which is
the rounding of weights stored in bfloat16."""
STEPS = 8
"""Steps of power iteration for the largest and the smallest eigenvalue."""
SMALLEST = 1e-30


def solve_in_float32(matrix: Tensor, right: Tensor) -> tuple[Tensor | None, float]:
    """Solve A X = B by a float32 Cholesky factor, unless that would be too inaccurate.

    A is scaled to a unit diagonal, which nearly minimizes its condition. Then the condition is measured. Inputs of
    large numbers, such as of attention sinks, make the condition of A itself large without any harm to its factor.

    Args:
        matrix: A (n, n), symmetric and positive definite, float32. It is overwritten.
        right: B (n, m), float32.

    Returns:
        X (n, m), None if the condition is too large or A isn't positive definite in float32; and the measured condition
        of the scaled matrix.
    """
    scale = matrix.diagonal().clamp_min(SMALLEST).rsqrt()[:, None]
    matrix.mul_(scale).mul_(scale.T)
    lower, info = torch.linalg.cholesky_ex(matrix)
    condition = float("inf") if int(info) else _condition(matrix, lower)
    if condition > LARGEST_CONDITION:
        return None, condition
    return scale * torch.cholesky_solve(scale * right, lower), condition


def _condition(matrix: Tensor, lower: Tensor) -> float:
    """Return the ratio of the largest to the smallest eigenvalue of A = L L^T, by power iterations with A and A^-1."""
    start = torch.randn(len(matrix), 2, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    largest, smallest = start[:, :1], start[:, 1:]
    for _ in range(STEPS):
        largest = matrix @ (largest / largest.norm())
        smallest = torch.cholesky_solve(smallest / smallest.norm(), lower)
    condition = float(largest.norm() * smallest.norm())
    return condition if condition > 0 else float("inf")  # NaN, too
