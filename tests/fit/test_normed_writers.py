"""Writers before a norm: the targets of their fit against formulas in float64, coordinate by coordinate."""

import pytest
import torch
from torch import Tensor

from eigenslice.cut.blocks import SiteBasis, identity_basis
from eigenslice.fit.normed_writers import DAMPING, SMALLEST_GAIN, NormedWriter
from eigenslice.runtime.offload import Offload, OffloadedTensors
from eigenslice.stream.walk import Activations
from tests.reference import rms_norm

EPS, WIDTH = 1e-5, 12


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(*values: Tensor) -> OffloadedTensors:
    kept = Offload("device", torch.device("cpu")).tensors()
    for value in values:
        kept.append(value)
    return kept


@pytest.fixture
def batch() -> Activations:
    """A batch (2, 5, D) whose third token doesn't count, with the dense stream and the norm's input."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    return Activations(
        tensors(3 * normal(2, 5, WIDTH, seed=1)), 0, mask, [], 0, tensors(0.2 * normal(2, 5, WIDTH, seed=2))
    )


def basis_of(width: int, *, rotated: bool = True) -> SiteBasis:
    if not rotated:
        return identity_basis(width, "cpu")
    return SiteBasis(torch.linalg.qr(normal(WIDTH, width, seed=3))[0])


def rows(batch: Activations) -> tuple[Tensor, Tensor]:
    """Stream and norm's input of the tokens that count."""
    assert batch.mask is not None
    return batch.streams[0][batch.mask], batch.unnormed[0][batch.mask]


def share(x: Tensor) -> Tensor:
    return 1 / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


GAINS = {
    "of both signs": normal(WIDTH, seed=4),
    "one is zero": normal(WIDTH, seed=4) * (torch.arange(WIDTH) != 5),
    "all are zero": torch.zeros(WIDTH, dtype=torch.float64),
}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("gain", GAINS.values(), ids=GAINS)
def test_without_an_error_the_target_is_what_the_dense_writer_gives(
    gain: Tensor, rotated: bool, batch: Activations
) -> None:
    """So that, with nothing cut, a fit gives the dense writer back."""
    basis = basis_of(WIDTH, rotated=rotated)
    writer = NormedWriter(gain, basis, EPS)
    _, u = rows(batch)
    outputs = writer.outputs(batch, basis.embed(gain * rms_norm(u, EPS)))
    torch.testing.assert_close(outputs, writer.weight(batch) * writer.scale * u)
    assert outputs.isfinite().all()
    assert (writer.scale > 0).all()


@pytest.mark.parametrize("width", [WIDTH, 7])
def test_the_target_is_the_least_loss_of_error_and_change(width: int, batch: Activations) -> None:
    """The minimum over y of |g (y - own) - error|^2 + DAMPING * mean(scale^2) * |y - own|^2, found by least squares."""
    gain, basis = GAINS["one is zero"], basis_of(width)
    writer = NormedWriter(gain, basis, EPS)
    hidden, u = rows(batch)
    missing = normal(len(u), width, seed=6)
    own = rms_norm(u, EPS)
    error = missing @ basis.matrix.T / basis.scale - (gain * own) @ basis.matrix @ basis.matrix.T
    least = SMALLEST_GAIN * gain.square().mean().sqrt()
    scale = torch.stack([max(g.abs(), least) for g in gain])
    damping = (DAMPING * scale.square().mean()).sqrt() * torch.eye(WIDTH, dtype=torch.float64)
    losses = torch.cat([torch.diag(gain), damping])
    right = torch.cat([error.T, torch.zeros(WIDTH, len(u), dtype=torch.float64)])
    expected = own + torch.linalg.lstsq(losses, right).solution.T
    torch.testing.assert_close(writer.outputs(batch, missing), expected * scale * share(hidden))


def test_an_error_is_repaired_where_the_gain_is_large_and_left_where_it_is_small(batch: Activations) -> None:
    gain = torch.ones(WIDTH, dtype=torch.float64)
    gain[0], gain[1] = 30.0, -1e-6
    writer = NormedWriter(gain, basis_of(WIDTH, rotated=False), EPS)
    hidden, u = rows(batch)
    own, error = rms_norm(u, EPS), normal(len(u), WIDTH, seed=7)
    target = writer.outputs(batch, gain * own + error) / writer.scale / share(hidden)
    repaired = gain * (target - own)
    torch.testing.assert_close(repaired[:, 0], error[:, 0], rtol=0.15, atol=0)
    assert (target - own)[:, 1].abs().max() < 1e-5 * error.abs().max()


def test_tokens_count_by_both_norms(batch: Activations) -> None:
    hidden, u = rows(batch)
    weight = NormedWriter(GAINS["of both signs"], basis_of(7), EPS).weight(batch)
    torch.testing.assert_close(weight, share(hidden) * share(u))
    assert len(weight) == 9


def test_before_a_gap_the_writer_keeps_what_the_dense_one_gave(batch: Activations) -> None:
    """The dense stream goes on through the block that is left out, whose norms have other inputs."""
    writer = NormedWriter(GAINS["of both signs"], basis_of(7), EPS)
    missing = normal(9, 7, seed=8)
    before = writer.outputs(batch, missing), writer.weight(batch)
    kept = writer.before_gap([batch], tensors())
    batch.keep_unnormed(normal(2, 5, WIDTH, seed=9))
    after = kept.outputs(batch, missing), kept.weight(batch)
    assert all(map(torch.equal, before, after))
    assert not torch.allclose(writer.weight(batch), before[1])
