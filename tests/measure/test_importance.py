"""The first pass against sums over what hooks on transformers' own model see."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum
from eigenslice.arch import lookup
from eigenslice.arch.heads import HeadCounts
from eigenslice.checkpoint.source import open_source
from eigenslice.cut.blocks import ALL
from eigenslice.data.batches import Batch
from eigenslice.measure.importance import HEAD_WEIGHT, Measurement, measure
from eigenslice.model.dense import DenseModel
from eigenslice.plan.plan import Plan
from tests import tiny
from tests.conftest import Folders
from tests.results import load
from tests.runs import run_of

FLAT = Spectrum(torch.ones(2), torch.eye(2))


def formulas(model: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Weighted second moment of the normalized stream, and energy of each neuron: in float64, from hooks."""
    table = lookup(model.config)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    names = [f"{table.layers}.{index}." for index in range(model.config.num_hidden_layers)]
    norms = [f"{name}{site[0].norm}" for name in names for site in table.sites(model.config)] + [table.final_norm]
    writers = [name + table.mlp.neuron_writer for name in names]
    post_norms = [name + table.mlp.post_norm for name in names if table.mlp.post_norm]
    seen: dict[str, Tensor] = {}
    for name in (*norms, *writers, *post_norms):

        def keep(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].reshape(*ids.shape, -1)[real].double()

        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(ids, attention_mask=mask)
    eps, layer_norm = table.epsilon(model.config), table.norm == "layer"
    streams = [seen[name] - seen[name].mean(1, keepdim=True) * layer_norm for name in norms]
    moment = torch.zeros(tiny.WIDTH, tiny.WIDTH, dtype=torch.float64)
    for x, weight in zip(streams, [1.0] * (len(norms) - 1) + [HEAD_WEIGHT], strict=True):
        normal = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
        moment += weight * normal.T @ normal
    energies = []
    before = streams[:-1] if table.is_parallel(model.config) else streams[1::2]
    for number, (name, x) in enumerate(zip(writers, before, strict=True)):
        weight = model.get_submodule(name).weight.detach().double()
        if post_norms:  # gain * W a / rms(W a)
            unnormed, norm = seen[post_norms[number]], model.get_submodule(post_norms[number])
            gain = norm.weight.detach().double() + (1 if table.gain == "1+w" else 0)
            weight = weight * gain[:, None]
            x = x * (unnormed.square().mean(1, keepdim=True) + eps).sqrt()
        column = weight - weight.mean(0) * layer_norm
        added = seen[name][:, None, :] * column  # (tokens, D, neurons): what each neuron adds
        energies.append((added.square().sum(1) / (x.square().mean(1, keepdim=True) + eps)).sum(0))
    return moment, energies


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", [*tiny.CORE, "gemma2", "gemma4_text", "glm4"])
def test_moment_and_energies_of_the_neurons(case: str, padded: bool, dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    ids, mask = tiny.random_ids(6, 18), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5], mask[4, 12:] = 0, 0
    masks = [None, None] if mask is None else mask.split(4)
    batches = [Batch(part, m) for part, m in zip(ids.split(4), masks, strict=True)]
    blocks: list[int] = []
    found = measure(run_of(dense, batches, tmp_path, lambda stage, done, total, tokens=0: blocks.append(done)))
    moment, energies = formulas(load(dense_folder(case)), ids, mask)
    values, vectors = found.spectrum.values, found.spectrum.vectors
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, moment, rtol=1e-4, atol=1e-3)
    assert len(found.neuron_importance) == 3
    for actual, expected in zip(found.neuron_importance, energies, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert sorted(set(blocks)) == [0, 1, 2, 3]


def plan(neurons: tuple[int, ...], heads: int | None = None) -> Plan:
    return Plan("global", (2,), True, None, neurons, heads)


def test_those_with_the_largest_energy_are_kept_in_their_order() -> None:
    energy = [torch.tensor(values, dtype=torch.float64) for values in ([5.0, 1, 4, 3, 2], [1.0, 2, 3, 4, 5])]
    found = Measurement(FLAT, energy, [])
    kept = [some.neurons for some in found.kept(plan((3, 2)))]
    assert [some.tolist() for some in kept if some is not None] == [[0, 2, 3], [3, 4]]
    kept = [some.neurons for some in found.kept(plan((5, 1)))]
    assert kept[0] is None  # all of them
    assert kept[1] is not None
    assert kept[1].tolist() == [4]


def test_without_energies_all_are_kept() -> None:
    assert Measurement(FLAT, [], []).kept(plan((0, 0, 0))) == [ALL, ALL, ALL]


def test_heads_are_kept_in_their_order() -> None:
    ranked = [torch.tensor(order) for order in ([2, 0, 3, 1], [3, 1, 0, 2])]
    queries = [torch.tensor(order) for order in ([7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7])]
    found = Measurement(FLAT, [], ranked, query_order=queries, head_counts=HeadCounts(4, 2))

    def kept(numbers: Plan) -> list[list[list[int]]]:
        return [some.query_heads.tolist() for some in found.kept(numbers) if some.query_heads is not None]

    both = plan((0, 0), heads=2)
    assert kept(both) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert kept(replace(both, query_heads=2)) == [[[1], [5]], [[2], [6]]]
    assert kept(replace(both, kv_heads=None, query_heads=4)) == [[[1], [3], [5], [7]], [[0], [2], [4], [6]]]
    assert kept(plan((0, 0))) == []
