"""The refit against least squares solved on the tokens themselves."""

import torch

from eigenslice.algebra.refit import reading_matrix


def sample(tokens: int = 200, width: int = 12, kept: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated tokens, and an orthonormal basis that is not theirs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing
    basis, _ = torch.linalg.qr(torch.randn(width, kept, generator=generator, dtype=torch.float64))
    return x, basis


def test_it_is_the_ridge_regression_from_the_kept_part_onto_the_reader() -> None:
    x, basis = sample()
    weight = torch.randn(5, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = x.T @ x
    ridge = 0.3
    level = ridge * float(moment.diagonal().mean())
    # min_V |X W^T - Z V^T|^2 + level |V - W Q|^2, as one least-squares problem with rows for the ridge
    z = x @ basis
    rows = torch.cat([z, level**0.5 * torch.eye(basis.shape[1], dtype=torch.float64)])
    targets = torch.cat([x @ weight.T, level**0.5 * (weight @ basis).T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(weight @ reading_matrix(basis, moment, ridge), expected)


def test_it_is_better_than_reading_the_kept_part_alone() -> None:
    x, basis = sample()
    z, refitted = x @ basis, reading_matrix(basis, x.T @ x)
    assert (x - z @ refitted.T).norm() < 0.9 * (x - z @ basis.T).norm()


def test_nothing_changes_where_nothing_is_cut() -> None:
    x, basis = sample(kept=12)
    torch.testing.assert_close(reading_matrix(basis, x.T @ x), basis)


def test_nothing_changes_in_the_streams_own_principal_components() -> None:
    x, _ = sample()
    basis = torch.linalg.eigh(x.T @ x).eigenvectors[:, -7:]
    torch.testing.assert_close(reading_matrix(basis, x.T @ x), basis)


def test_directions_without_energy_are_no_problem() -> None:
    x, basis = sample()
    assert torch.isfinite(reading_matrix(basis, torch.zeros(12, 12, dtype=torch.float64))).all()
    x[:, 3:] = 0
    assert torch.isfinite(reading_matrix(basis, x.T @ x)).all()
