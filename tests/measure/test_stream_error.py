"""The distance of a sliced stream from the dense one, against the formula on every token in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from eigenslice.cut.blocks import SiteBasis
from eigenslice.data.batches import BESIDE_GROUP, HELD_OUT_GROUP
from eigenslice.measure.stream_error import stream_error
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.ranks import ALONE, Ranks
from eigenslice.stream.walk import Activations, Site

WIDTH, KEPT, EPS = 12, 8, 1e-9
GENERATOR = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(WIDTH, KEPT, generator=GENERATOR, dtype=torch.float64))[0]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """One batch of both models: the streams, the tokens that count, and the group."""

    dense: Tensor
    sliced: Tensor
    mask: Tensor
    group: int


def sequences(group: int, count: int, *, padded: bool = False) -> Sequences:
    """Return random streams; the sizes of the tokens differ by orders of magnitude."""
    sizes = 10 ** random(count, 5, 1)
    mask = torch.ones(count, 5, dtype=torch.bool)
    if padded:
        mask[0, :3] = False
    return Sequences(sizes * random(count, 5, WIDTH), sizes * random(count, 5, KEPT), mask, group)


def offloaded(tensors: list[Tensor]) -> OffloadedTensors:
    result = OffloadedTensors("device", torch.device("cpu"))
    for tensor in tensors:
        result.append(tensor)
    return result


def site_of(batches: list[Sequences]) -> tuple[Site, OffloadedTensors]:
    """Return a site with the dense streams, and the sliced streams."""
    dense, sliced = offloaded([batch.dense for batch in batches]), offloaded([batch.sliced for batch in batches])
    masks = [None if batch.mask.all() else batch.mask for batch in batches]
    activations = [
        Activations(dense, number, mask, [], batch.group, unnormed=offloaded([]))
        for number, (batch, mask) in enumerate(zip(batches, masks, strict=True))
    ]
    return Site(1, 0, None, None, activations, dense, WIDTH, EPS), sliced


def formula(batches: list[Sequences]) -> dict[str, float]:
    """Return |x - Q z / c|^2 / |x|^2 and |Q^T x|^2 / |x|^2, each as a mean over all tokens that count."""
    scale = (KEPT / WIDTH) ** 0.5
    x = torch.cat([batch.dense[batch.mask] for batch in batches]).double()
    z = torch.cat([batch.sliced[batch.mask] for batch in batches]).double()
    size = x.square().sum(1)
    error = (x - z / scale @ BASIS.T).square().sum(1) / size
    return {"error": float(error.mean()), "energy_kept": float(((x @ BASIS).square().sum(1) / size).mean())}


def found(batches: list[Sequences], ranks: Ranks = ALONE) -> dict[str, float]:
    site, sliced = site_of(batches)
    return stream_error(site, SiteBasis(BASIS), sliced, ranks)


def test_held_out_tokens_count_alone() -> None:
    held_out = [sequences(HELD_OUT_GROUP, 4), sequences(HELD_OUT_GROUP, 2, padded=True)]
    others = [sequences(0, 3), sequences(1, 2), sequences(BESIDE_GROUP, 5)]
    result = found([others[0], held_out[0], others[1], held_out[1], others[2]])
    assert result == pytest.approx(formula(held_out), rel=1e-4)
    assert result != pytest.approx(formula([*held_out, *others]), rel=0.01)


def test_without_held_out_tokens_the_texts_count_and_nothing_beside_them() -> None:
    texts, beside = [sequences(0, 3, padded=True), sequences(1, 4)], sequences(BESIDE_GROUP, 5)
    result = found([texts[0], beside, texts[1]])
    assert result == pytest.approx(formula(texts), rel=1e-4)
    assert result != pytest.approx(formula([*texts, beside]), rel=0.01)


def test_the_projected_stream_misses_the_cut_part_only() -> None:
    batch = sequences(HELD_OUT_GROUP, 4)
    projected = dataclasses.replace(batch, sliced=(KEPT / WIDTH) ** 0.5 * batch.dense @ BASIS.float())
    result = found([projected])
    assert 0.2 < result["error"] < 0.8
    assert result["error"] + result["energy_kept"] == pytest.approx(1, abs=1e-5)


def test_ranks_add_their_tokens_and_not_their_means() -> None:
    own, others = [sequences(HELD_OUT_GROUP, 1)], [sequences(HELD_OUT_GROUP, 6), sequences(0, 2)]
    sums: list[Tensor] = []

    class OtherRank(Ranks):
        def sum(self, tensor: Tensor) -> Tensor:
            sums.append(tensor.clone())
            return tensor

    class ThisRank(Ranks):
        def sum(self, tensor: Tensor) -> Tensor:
            return tensor + sums[0]

    found(others, OtherRank())
    assert found(own, ThisRank()) == pytest.approx(formula([own[0], others[0]]), rel=1e-4)
