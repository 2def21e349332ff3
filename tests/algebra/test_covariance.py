"""Second moments, against sums written out."""

import pytest
import torch
from torch import Tensor

from eigenslice.algebra.covariance import SecondMoment, add_gram, normalize

WIDTH = 6


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, whose products and sums float32 holds exactly."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def written_out(rows: Tensor) -> Tensor:
    """Sum over rows of x^T x, one row at a time, in float64."""
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for row in rows.double():
        total += torch.outer(row, row)
    return total


def test_the_second_moment_is_the_sum_of_outer_products() -> None:
    x = activations(12, WIDTH)
    moment = SecondMoment(WIDTH)
    moment.add(x)
    torch.testing.assert_close(moment.matrix, written_out(x), rtol=0, atol=0)
    assert moment.tokens == 12


@pytest.mark.parametrize("width", [1, 255, 256, 259, 300])
def test_a_gram_matrix_is_the_product_and_symmetric(width: int) -> None:
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.ones(width, width, dtype=torch.float64)
    add_gram(found, rows)
    torch.testing.assert_close(found, 1 + rows.T @ rows)
    torch.testing.assert_close(found, found.T)


def test_chunks_add_up_to_the_whole() -> None:
    x = activations(40, WIDTH)
    whole, chunked = SecondMoment(WIDTH), SecondMoment(WIDTH)
    whole.add(x)
    for chunk in x.split([8, 24, 8]):
        chunked.add(chunk)
    assert torch.equal(chunked.matrix, whole.matrix)
    assert chunked.tokens == whole.tokens == 40


def test_chunks_are_added_in_float64() -> None:
    """In float32, 2^24 + 1 is 2^24: a thousand small tokens after a large one would vanish."""
    moment = SecondMoment(1)
    moment.add(torch.tensor([[4096.0]]))
    for _ in range(1000):
        moment.add(torch.tensor([[1.0]]))
    assert moment.matrix.dtype == torch.float64
    assert moment.matrix.item() == 2**24 + 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    """Neither bfloat16 nor float16 can hold 4097, the sum of as many ones."""
    moment = SecondMoment(1)
    moment.add(torch.ones(4097, 1, dtype=dtype))
    assert moment.matrix.item() == 4097


def test_float64_activations_keep_their_precision() -> None:
    moment = SecondMoment(1)
    moment.add(torch.tensor([[1 + 2.0**-40]], dtype=torch.float64))
    assert moment.matrix.item() == (1 + 2.0**-40) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalizing_is_an_rms_norm_without_gain(dtype: torch.dtype) -> None:
    x = (activations(2, 3, WIDTH) / 7).to(dtype)
    eps = 0.5
    rows = [[float(v) for v in row] for row in x.reshape(6, WIDTH)]
    expected = [[v / (sum(w * w for w in row) / WIDTH + eps) ** 0.5 for v in row] for row in rows]
    actual = normalize(x, eps)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64).to(dtype).view_as(x))


def test_normalizing_float16_does_not_overflow() -> None:
    """300^2 is more than float16 holds."""
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert torch.equal(normalize(x, 1e-5), torch.ones(1, 4, dtype=torch.float16))
