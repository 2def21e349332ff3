"""Least squares that are too large to factor: conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def conjugate_gradients(product: Linear, right: Tensor, precondition: Linear, steps: int) -> Tensor:
    """Approximate the solution of A x = b by some steps of preconditioned conjugate gradients from x = 0.

    After k steps, x minimizes x^T A x / 2 - b^T x over the span of M b, M A M b, ..., (M A)^(k-1) M b, where M is the
    preconditioner. So few steps regularize, too. Source: Saad, Iterative Methods for Sparse Linear Systems, algorithm
    9.1. Five tensors of the size of b are held, and b itself changes: the unknowns may be all readers of a wide MLP.

    Args:
        product: Function that gives A x, in a tensor of its own; A is symmetric and positive definite.
        right: The right side b, (m, n); it is overwritten.
        precondition: Function that gives M x, in a tensor of its own; M is symmetric and positive definite. The nearer
            M is to A^-1, the fewer steps are needed.
        steps: Number of steps. They end early at the exact solution.

    Returns:
        The approximation of x, with the shape of b.
    """
    solution, residual = torch.zeros_like(right), right
    direction = precondition(residual)
    size = _inner(residual, direction)
    for step in range(steps):
        image = product(direction)
        curvature = _inner(direction, image)
        if not curvature > 0:
            break  # b is zero, or has been reached
        length = size / curvature
        solution.add_(direction, alpha=length)
        if step + 1 == steps:
            break
        residual.sub_(image, alpha=length)
        del image
        preconditioned = precondition(residual)
        before, size = size, _inner(residual, preconditioned)
        direction = preconditioned.add_(direction, alpha=size / before)
    return solution


def _inner(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two tensors (m, n), summed over rows in float64."""
    return float(torch.linalg.vecdot(left, right).double().sum())
