"""Bases of the kept part of the stream: what they are, and what norms do in their coordinates."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from eigenslice.algebra.basis import (
    Spectrum,
    kept_basis,
    layer_norm_basis,
    principal_components,
    tied_basis,
    zero_sum_basis,
)
from eigenslice.algebra.norms import centre_rows

WIDTH, TOKENS, EPS = 10, 40, 1e-3


def stream(centred: bool = False, seed: int = 0) -> Tensor:
    """Tokens x WIDTH, correlated, with very different variances."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    mix = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    x = (x * torch.logspace(0, -2, WIDTH, dtype=torch.float64)) @ mix
    return centre_rows(x) if centred else x


def components(x: Tensor, centred: bool = False) -> Spectrum:
    return principal_components(x.T @ x, centred)


def assert_orthonormal(Q: Tensor) -> None:
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64))


def random_gain(seed: int = 9) -> Tensor:
    noise = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.3 * noise


@pytest.mark.parametrize("centred", [False, True])
def test_principal_components_diagonalize_the_moment(centred: bool) -> None:
    x = stream(centred)
    spectrum = components(x, centred)
    assert_orthonormal(spectrum.vectors)
    rebuilt = spectrum.vectors @ torch.diag(spectrum.values) @ spectrum.vectors.T
    torch.testing.assert_close(rebuilt, x.T @ x)


@pytest.mark.parametrize("centred", [False, True])
def test_eigenvalues_descend_and_are_never_negative(centred: bool) -> None:
    x = stream(centred)[: WIDTH // 2]  # rank deficient: rounding makes some eigenvalues slightly negative
    values = components(x, centred).values
    assert (values[:-1] >= values[1:]).all()
    assert (values >= 0).all()
    assert values[0] > 0


def test_no_other_directions_hold_more_energy_than_the_first_components() -> None:
    x = stream()
    spectrum = components(x)
    kept = float((x @ kept_basis(spectrum, 3)).square().sum())
    assert kept == pytest.approx(float(spectrum.values[:3].sum()))
    singular = torch.linalg.svdvals(x)
    assert kept == pytest.approx(float(singular[:3].square().sum()))


def test_a_centred_stream_has_the_constant_vector_last() -> None:
    vectors = components(stream(centred=True), centred=True).vectors
    constant = torch.full((WIDTH,), WIDTH**-0.5, dtype=torch.float64)
    torch.testing.assert_close(vectors[:, -1], constant)
    torch.testing.assert_close(vectors[:, :-1].sum(0), torch.zeros(WIDTH - 1, dtype=torch.float64))


def test_the_constant_vector_stays_last_where_other_directions_are_empty_too() -> None:
    x = stream(centred=True)[:2]
    spectrum = components(x, centred=True)
    torch.testing.assert_close(spectrum.vectors[:, -1].abs(), torch.full((WIDTH,), WIDTH**-0.5).double())
    assert spectrum.values[-1] == 0


def test_energy_is_the_share_of_the_first_components() -> None:
    spectrum = Spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.eye(4))
    assert [spectrum.energy(width) for width in range(5)] == pytest.approx([0, 0.4, 0.7, 0.9, 1])


def test_nothing_of_an_empty_stream_is_lost() -> None:
    assert Spectrum(torch.zeros(3), torch.eye(3)).energy(1) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 8, 33])
def test_the_zero_sum_basis_spans_what_sums_to_zero(width: int) -> None:
    basis = zero_sum_basis(width)
    assert basis.shape == (width, width - 1)
    assert basis.dtype == torch.float64
    assert_orthonormal(basis)
    projector = torch.eye(width, dtype=torch.float64) - 1 / width
    torch.testing.assert_close(basis @ basis.T, projector)


def test_the_kept_basis_is_the_first_components() -> None:
    spectrum = components(stream())
    assert torch.equal(kept_basis(spectrum, 4), spectrum.vectors[:, :4])


def test_the_kept_basis_can_end_in_the_constant_vector() -> None:
    spectrum = components(stream(centred=True), centred=True)
    basis = kept_basis(spectrum, 4, constant=True)
    assert torch.equal(basis[:, :3], spectrum.vectors[:, :3])
    torch.testing.assert_close(basis[:, 3], torch.full((WIDTH,), WIDTH**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", [2, 5, WIDTH])
def test_in_the_layer_norm_basis_a_layer_norm_is_an_rms_norm(width: int) -> None:
    x = stream(centred=True)
    basis = layer_norm_basis(components(x, centred=True), width)
    assert_orthonormal(basis)
    z = x @ basis
    torch.testing.assert_close(z.sum(-1), torch.zeros(TOKENS, dtype=torch.float64))
    torch.testing.assert_close(layer_norm(z, (width,), eps=EPS), rms_norm(z, (width,), eps=EPS))


def test_the_layer_norm_basis_holds_all_but_one_of_the_first_components() -> None:
    x = stream(centred=True)
    spectrum = components(x, centred=True)
    kept = (x @ layer_norm_basis(spectrum, 6)).square().sum()
    torch.testing.assert_close(kept, spectrum.values[:5].sum())


def test_at_full_width_the_layer_norm_of_rotated_coordinates_is_the_rotated_layer_norm() -> None:
    """The stream is not centred here: what the dense LayerNorm subtracts, centring the stream subtracts."""
    x = 2 + stream()
    basis = layer_norm_basis(components(centre_rows(x), centred=True), WIDTH)
    rotated = layer_norm(centre_rows(x) @ basis, (WIDTH,), eps=EPS)
    torch.testing.assert_close(rotated @ basis.T, layer_norm(x, (WIDTH,), eps=EPS))


def test_at_full_width_one_tied_matrix_serves_both_ends() -> None:
    """The head reads E diag(g) x, the tied one (E Q R) L (Q R)^T x."""
    x, gain = stream(), random_gain()
    embedding = stream(seed=1)
    matrix, tied_gain = tied_basis(kept_basis(components(x), WIDTH), gain)
    assert_orthonormal(matrix)
    logits = (embedding @ matrix) @ torch.diag(tied_gain) @ (matrix.T @ x.T)
    torch.testing.assert_close(logits, embedding @ torch.diag(gain) @ x.T)


def test_a_narrow_tied_basis_spans_what_the_kept_one_does_and_makes_the_gain_diagonal() -> None:
    basis, gain = kept_basis(components(stream()), 6), random_gain()
    matrix, tied_gain = tied_basis(basis, gain)
    assert matrix.shape == (WIDTH, 6)
    assert_orthonormal(matrix)
    torch.testing.assert_close(matrix @ matrix.T, basis @ basis.T)
    torch.testing.assert_close(matrix.T @ torch.diag(gain) @ matrix, torch.diag(tied_gain))
    assert tied_gain.std() > 0.01, "a constant gain would prove nothing"
    assert not math.isclose(float(matrix[0, 0]), float(basis[0, 0])), "the basis has to turn"
