"""Conjugate gradients against what they minimize, over the spaces that they search."""

import pytest
import torch
from torch import Tensor

from eigenslice.algebra.conjugate import conjugate_gradients

SIZE = (3, 4)
COUNT = 12


def positive(seed: int) -> Tensor:
    """A positive definite matrix, (12, 12)."""
    x = torch.randn(COUNT, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.T / 20 + 0.1 * torch.eye(COUNT)


def solve(steps: int, right: Tensor) -> Tensor:
    matrix, inverse = positive(1), positive(2)

    def times(m: Tensor, x: Tensor) -> Tensor:
        return (m @ x.flatten()).view(SIZE)

    return conjugate_gradients(lambda x: times(matrix, x), right.clone(), lambda x: times(inverse, x), steps)


RIGHT = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_it_minimizes_over_as_many_directions_as_there_are_steps(steps: int) -> None:
    matrix, inverse, right = positive(1), positive(2), RIGHT.flatten()
    space = [inverse @ right]
    for _ in range(1, steps):
        space.append(inverse @ matrix @ space[-1])
    basis = torch.linalg.qr(torch.stack(space, 1)).Q
    expected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ right)
    torch.testing.assert_close(solve(steps, RIGHT), expected.view(SIZE), rtol=1e-8, atol=1e-8)
    assert torch.linalg.norm(matrix @ expected - right) > 1e-3, "it would be the solution anyway"


def test_with_enough_steps_it_is_the_solution() -> None:
    expected = torch.linalg.solve(positive(1), RIGHT.flatten()).view(SIZE)
    torch.testing.assert_close(solve(40, RIGHT), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_comes_of_nothing(steps: int) -> None:
    assert not solve(steps, torch.zeros(SIZE, dtype=torch.float64)).any()
    assert not solve(0, RIGHT).any()
