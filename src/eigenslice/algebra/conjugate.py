"""Least squares that are too large to factor: conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def conjugate_gradients(product: Linear, right: Tensor, precondition: Linear, steps: int) -> Tensor:
    """Approximate the solution of A x = b by some steps of preconditioned conjugate gradients from x = 0.

    After k steps, x minimizes x^T A x / 2 - b^T x over the span of M b, M A M b, ..., (M A)^(k-1) M b, where M is the
    preconditioner. So few steps regularize, too. Source: Saad, Iterative Methods for Sparse Linear Systems, algorithm
    9.1.

    Args:
        product: Function that gives A x; A is symmetric and positive definite.
        right: The right side b, of any shape.
        precondition: Function that gives M x; M is symmetric and positive definite. The nearer M is to A^-1, the fewer
            steps are needed.
        steps: Number of steps. They end early at the exact solution.

    Returns:
        The approximation of x, with the shape of b.
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
