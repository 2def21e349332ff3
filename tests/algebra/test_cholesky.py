"""Factors and solutions in place; solving in float32 against float64, over the conditions that regressions meet."""

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from eigenslice.algebra.cholesky import LARGEST_CONDITION, factor_in_place, solve_in_float32, solve_in_place
from eigenslice.algebra.refit import NormalEquations

SIZE = 40
BF16_ROUNDING = 2**-9


def matrix(condition: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 to 1 / condition, its diagonal about even."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return rotation @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), SIZE).double()) @ rotation.T


def right() -> Tensor:
    return torch.randn(SIZE, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_and_solutions_take_no_memory(dtype: torch.dtype) -> None:
    size = 4 * SIZE
    a = torch.eye(size, dtype=dtype)
    a[:SIZE, :SIZE] += matrix(1e2).to(dtype)
    b = torch.randn(size, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)
    exact, whole = torch.linalg.solve(a, b), a.clone()
    with profile(profile_memory=True) as measured:
        lower = factor_in_place(a)
        found = solve_in_place(lower, b)
    assert sum(max(0, event.self_cpu_memory_usage) for event in measured.events() or ()) < a.nbytes / 10
    assert lower.data_ptr() == a.data_ptr()
    assert found.data_ptr() == b.data_ptr()
    torch.testing.assert_close(lower @ lower.T, whole)
    torch.testing.assert_close(lower, lower.tril())
    torch.testing.assert_close(found, exact)


def test_what_is_not_positive_definite_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="positive-definite"):
        factor_in_place(-torch.eye(SIZE))


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e4])
def test_within_the_limit_it_is_as_exact_as_weights_in_bfloat16(condition: float) -> None:
    a, b = matrix(condition), right()
    found, measured = solve_in_float32(a.float(), b.float())
    assert found is not None
    exact = torch.linalg.solve(a, b)
    assert float((found - exact).norm() / exact.norm()) < BF16_ROUNDING
    assert measured <= LARGEST_CONDITION
    scale = a.diagonal().rsqrt()
    true = float(torch.linalg.cond(scale[:, None] * a * scale))
    assert 0.5 * true < measured < 1.01 * true


@pytest.mark.parametrize("condition", [1e6, 1e12])
def test_beyond_the_limit_nothing_is_solved(condition: float) -> None:
    found, measured = solve_in_float32(matrix(condition).float(), right().float())
    assert found is None
    assert measured > LARGEST_CONDITION


def test_inputs_of_other_sizes_do_no_harm() -> None:
    """Attention sinks: some inputs are thousands of times as large as the others."""
    sizes = torch.ones(SIZE, dtype=torch.float64)
    sizes[:3] = 1e4
    a, b = sizes[:, None] * matrix(100.0) * sizes, right()
    assert float(torch.linalg.cond(a)) > 1e7
    found, _ = solve_in_float32(a.float(), b.float())
    assert found is not None
    exact = torch.linalg.solve(a, b)
    assert float((found - exact).norm() / exact.norm()) < BF16_ROUNDING


@pytest.mark.parametrize(("ridge", "dtype"), [(0.1, torch.float32), (1e-9, torch.float64)])
def test_a_regression_falls_back_to_float64(ridge: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(500, SIZE, generator=generator).double() @ matrix(1e4)
    outputs, base = (torch.randn(*shape, generator=generator).double() for shape in ((500, 5), (5, SIZE)))

    def equations() -> NormalEquations:
        sums = NormalEquations.zeros(SIZE, 5)
        sums.add(inputs, outputs)
        return sums

    exact = equations().solve(base, ridge)
    found = equations().solve(base, ridge, torch.float32)
    assert exact.dtype == torch.float64
    assert found.dtype == dtype
    assert (found.condition > LARGEST_CONDITION) == (dtype == torch.float64)
    torch.testing.assert_close(found.weights, exact.weights, rtol=BF16_ROUNDING, atol=1e-4)
    if dtype == torch.float64:
        assert torch.equal(found.weights, exact.weights)
