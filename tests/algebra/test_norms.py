"""Folding norms, against torch's own norms followed by the layer."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

from eigenslice.algebra.norms import centre_rows, centre_writer, fold_into_reader

WIDTH, OUTPUTS, EPS = 12, 7, 1e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, none of them special."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [None, random(OUTPUTS, seed=4)], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shift", [None, random(WIDTH, seed=3)], ids=["no-shift", "shift"])
@pytest.mark.parametrize("gain", [None, random(WIDTH, seed=2)], ids=["no-gain", "gain"])
def test_a_folded_reader_does_what_norm_and_reader_did(
    gain: Tensor | None, shift: Tensor | None, bias: Tensor | None
) -> None:
    x, weight = random(5, WIDTH), random(OUTPUTS, WIDTH, seed=1)
    folded, folded_bias = fold_into_reader(weight, bias, gain, shift)
    expected = linear(layer_norm(x, (WIDTH,), gain, shift, EPS), weight, bias)
    torch.testing.assert_close(linear(layer_norm(x, (WIDTH,), eps=EPS), folded, folded_bias), expected)
    assert (folded_bias is None) == (bias is None and shift is None)


def test_a_folded_reader_of_an_rms_norm_does_what_norm_and_reader_did() -> None:
    x, weight, gain = random(5, WIDTH), random(OUTPUTS, WIDTH, seed=1), random(WIDTH, seed=2)
    folded, bias = fold_into_reader(weight, None, gain, None)
    assert bias is None
    expected = linear(rms_norm(x, (WIDTH,), gain, EPS), weight)
    torch.testing.assert_close(linear(rms_norm(x, (WIDTH,), eps=EPS), folded), expected)


def test_folding_leaves_its_arguments_alone() -> None:
    tensors = random(OUTPUTS, WIDTH), random(OUTPUTS), random(WIDTH, seed=1), random(WIDTH, seed=2)
    copies = [tensor.clone() for tensor in tensors]
    fold_into_reader(*tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_on_centred_rows_an_rms_norm_is_a_layer_norm() -> None:
    x = 3 + random(5, WIDTH)
    expected = layer_norm(x, (WIDTH,), eps=EPS)
    torch.testing.assert_close(rms_norm(centre_rows(x), (WIDTH,), eps=EPS), expected)


def test_centring_rows_is_the_projection_onto_what_sums_to_zero() -> None:
    x = 3 + random(2, 5, WIDTH)
    M = torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH
    torch.testing.assert_close(centre_rows(x), x @ M)


def test_a_bias_is_centred_as_a_row() -> None:
    bias = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(centre_rows(bias), torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64))


def test_a_centred_writer_writes_what_centring_afterwards_would_give() -> None:
    x, weight, bias = random(5, OUTPUTS), 1 + random(WIDTH, OUTPUTS, seed=1), 1 + random(WIDTH, seed=2)
    written = linear(x, centre_writer(weight), centre_rows(bias))
    torch.testing.assert_close(written, centre_rows(linear(x, weight, bias)))
    torch.testing.assert_close(written.sum(-1), torch.zeros(5, dtype=torch.float64))
