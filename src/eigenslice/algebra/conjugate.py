"""Least squares that are too large to factor: conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def conjugate_gradients(product: Linear, right: Tensor, precondition: Linear, steps: int) -> Tensor:
    """What some steps of preconditioned conjugate gradients make of A x = b, from x = 0.

    After k steps, x minimizes x^T A x / 2 - b^T x over the span of M b, M A M b, ..., (M A)^(k-1) M b, M being the
    preconditioner (Saad, Iterative Methods for Sparse Linear Systems, algorithm 9.1): few steps regularize, too.

    Args:
        product: A x, A symmetric and positive definite.
        right: b, of any shape.
        precondition: M x, M symmetric and positive definite; the nearer to A^-1, the fewer steps are needed.
        steps: How many. They end where nothing is left to do.

    Returns:
        x, of b's shape.
    """
    solution, residual = torch.zeros_like(right), right
    preconditioned = precondition(residual)
    direction, size = preconditioned, (residual * preconditioned).sum()
    for step in range(steps):
        image = product(direction)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:
            break  # b is zero, or has been reached
        length = size / curvature
        solution = solution + length * direction
        if step + 1 == steps:
            break
        residual = residual - length * image
        preconditioned = precondition(residual)
        before, size = size, (residual * preconditioned).sum()
        direction = preconditioned + size / before * direction
    return solution
