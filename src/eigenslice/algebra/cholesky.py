"""Cholesky factors in the place of their matrices, and solving in float32 where the condition allows it."""

import torch
from torch import Tensor

LARGEST_CONDITION = 2.0**15
"""Largest condition for float32. Its rounding, 2^-24, then changes a solution by at most about 2^-9 of itself, which is
the rounding of weights stored in bfloat16."""
STEPS = 8
"""Steps of power iteration for the largest and the smallest eigenvalue."""
SMALLEST = 1e-30


def factor_in_place(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor L of A = L L^T, in the memory of A.

    LAPACK works on columns, and a matrix that is stored by rows is copied first. The transposed view of a symmetric
    matrix is stored by columns.

    Args:
        matrix: A (n, n), symmetric; it is overwritten.

    Raises:
        torch.linalg.LinAlgError: A isn't positive definite.
    """
    lower = matrix.mT
    return torch.linalg.cholesky(lower, out=lower)


def solve_in_place(lower: Tensor, right: Tensor) -> Tensor:
    """Solve L L^T X = B, in the memory of B. `torch.cholesky_solve` copies L, which may be the largest matrix of a run.

    Args:
        lower: L (n, n), lower triangular.
        right: B (n, m); it is overwritten.
    """
    rows = right.mT  # stored by columns, as LAPACK has it
    torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, out=rows)
    torch.linalg.solve_triangular(lower, rows, upper=False, left=False, out=rows)
    return right


def solve_in_float32(matrix: Tensor, right: Tensor) -> tuple[Tensor | None, float]:
    """Solve A X = B by a float32 Cholesky factor, unless that would be too inaccurate.

    A is scaled to a unit diagonal, which nearly minimizes its condition. Then the condition is measured. Inputs of
    large numbers, such as of attention sinks, make the condition of A itself large without any harm to its factor.

    Args:
        matrix: A (n, n), symmetric and positive definite, float32. It is overwritten.
        right: B (n, m), float32. It is overwritten, too.

    Returns:
        X (n, m), None if the condition is too large or A isn't positive definite in float32; and the measured condition
        of the scaled matrix.
    """
    scale = matrix.diagonal().clamp_min(SMALLEST).rsqrt()[:, None]
    matrix.mul_(scale).mul_(scale.T)
    lower, info = matrix.mT, torch.zeros((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    condition = float("inf") if int(info) else _condition(lower)
    if condition > LARGEST_CONDITION:
        return None, condition
    return solve_in_place(lower, right.mul_(scale)).mul_(scale), condition


def _condition(lower: Tensor) -> float:
    """Return the ratio of the largest to the smallest eigenvalue of A = L L^T, by power iterations with A and A^-1."""
    start = torch.randn(len(lower), 2, generator=torch.Generator().manual_seed(0)).to(lower.device)
    largest, smallest = start[:, :1], start[:, 1:]
    for _ in range(STEPS):
        largest = lower @ (lower.mT @ (largest / largest.norm()))
        smallest = solve_in_place(lower, smallest / smallest.norm())
    condition = float(largest.norm() * smallest.norm())
    return condition if condition > 0 else float("inf")  # NaN, too
