"""Neurons per block: losses are those of transformers' model, and no other allocation loses less."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.checkpoint.source import open_source
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.measure.importance import measure
from eigenslice.model.dense import DenseModel
from eigenslice.search import parted
from eigenslice.search.allocation import BlockLosses, block_losses
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load
from tests.runs import run_of

KEPT = 24
EPS = 1e-5  # of the tiny models; beside their streams it hardly counts
WRITERS = {"llama": "mlp.down_proj", "qwen3-tied": "mlp.down_proj", "phi": "mlp.fc2", "opt": "fc2"}


def losses_of(dense: DenseModel, fit: Tensor, held_out: Tensor, folder: Path, kept: int = KEPT) -> BlockLosses:
    run = run_of(dense, [Batch(fit)], folder)
    batches = [Batch(fit), Batch(held_out, group=HELD_OUT_GROUP)]
    return block_losses(run, measure(run), kept, batches)


def writers(model: Any, name: str) -> list[nn.Linear]:
    """The MLPs' writers, block by block."""
    return [module for path, module in model.named_modules() if path.endswith("." + name)]


def read_by(module: nn.Module, model: Any, ids: Tensor) -> Tensor:
    """What a module reads, (tokens, n)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def stream_sizes(module: nn.Linear, model: Any, case: str, ids: Tensor) -> Tensor:
    """Root mean square of the stream before a block's MLP (and attention, where they are parallel), (tokens, 1)."""
    index = writers(model, WRITERS[case]).index(module)
    layers = model.model.decoder.layers if case == "opt" else model.model.layers
    norm = {"phi": "input_layernorm", "opt": "final_layer_norm"}.get(case, "post_attention_layernorm")
    x = read_by(layers[index].get_submodule(norm), model, ids)
    if case in ("phi", "opt"):
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("case", WRITERS)
def test_a_block_s_loss_is_that_of_the_model_with_its_writer_refitted(
    case: str, dense_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dense_folder(case)
    dense, model = DenseModel(open_source(str(folder))), load(folder, dtype=torch.float64)
    fit, held_out = tiny.random_ids(12, 24, seed=1), tiny.random_ids(4, 24, seed=2)
    monkeypatch.setattr(parted, "TOKENS", 48)
    measurement = measure(run_of(dense, [Batch(fit)], tmp_path))
    losses = losses_of(dense, fit, held_out, tmp_path)
    seen = held_out[:, :12]
    with torch.no_grad():
        expected = model(seen).logits.log_softmax(-1)
    for index, writer in enumerate(writers(model, WRITERS[case])):
        a = read_by(writer, model, fit) / stream_sizes(writer, model, case, fit)
        order = measurement.neuron_importance[index].argsort(descending=True)
        gram = (a.T @ a)[order][:, order]
        ridge = DEFAULT_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        whole = writer.weight.detach()[:, order]
        kept, cut = gram[:KEPT, :KEPT] + ridge[:KEPT, :KEPT], gram[:KEPT, KEPT:]
        left = (gram + ridge)[KEPT:, KEPT:] - cut.T @ torch.linalg.inv(kept) @ cut
        weights = whole[:, KEPT:]
        centred = weights - weights.mean(0) if case in ("phi", "opt") else weights
        error = torch.einsum("ic,cd,id->", centred, left, centred)
        assert float(losses.error[index, KEPT]) == pytest.approx(float(error), rel=1e-3)
        before = writer.weight.data.clone()
        writer.weight.data[:, order[:KEPT]] = whole[:, :KEPT] + weights @ cut.T @ torch.linalg.inv(kept)
        writer.weight.data[:, order[KEPT:]] = 0
        with torch.no_grad():
            actual = model(seen).logits.log_softmax(-1)
        writer.weight.data = before
        loss = float((expected.exp() * (expected - actual)).sum(-1).mean())
        assert loss > 1e-5
        assert float(losses.kl[index]) == pytest.approx(loss, rel=2e-3)


def test_keeping_all_neurons_loses_nothing(dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    fit, held_out = tiny.random_ids(12, 24, seed=1), tiny.random_ids(4, 24, seed=2)
    losses = losses_of(dense, fit, held_out, tmp_path, dense.anatomy.neuron_count)
    assert losses.kl.abs().max() < 1e-5
    assert not losses.error[:, -1].any()


@pytest.mark.parametrize("seed", range(5))
def test_no_other_allocation_loses_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(4, 32, generator=generator, dtype=torch.float64).sort(descending=True).values
    error = torch.cat([steps.flip(1).cumsum(1).flip(1), torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    losses = BlockLosses(torch.rand(4, generator=generator, dtype=torch.float64), 16, error)
    counts = losses.allocate(20, 4)

    def total(chosen: tuple[int, ...]) -> float:
        each = losses.kl / error[:, 16] * error[torch.arange(4), torch.tensor(chosen)]
        return float(each.sum())

    others = [c for c in itertools.product(range(8, 33, 4), repeat=4) if sum(c) <= 80]
    assert sum(counts) <= 80
    assert counts in others
    assert total(counts) == pytest.approx(min(map(total, others)), rel=1e-9)


def test_every_block_keeps_some_and_a_full_budget_keeps_all() -> None:
    error = torch.linspace(1, 0, 41, dtype=torch.float64).expand(3, 41)
    losses = BlockLosses(torch.tensor([1e-9, 1.0, 1.0], dtype=torch.float64), 20, error)
    assert sorted(losses.allocate(30, 8)) == [16, 32, 40]  # a quarter of 40, in steps of 8
    assert losses.allocate(30, 8)[0] == 16
    assert losses.allocate(40, 8) == (40, 40, 40)
    assert losses.allocate(1, 8) == (16, 16, 16)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied", "opt"])
def test_keep_gives_blocks_their_own_numbers_in_the_custom_class_only(case: str, run_slice: Slicer) -> None:
    whole = tiny.CASES[case].config.get("intermediate_size", 64)
    custom = run_slice(case, keep=0.8, form="custom").manifest
    assert custom["parameters"]["kept"] <= 0.8
    trials = custom["trials"]
    uneven = [trial for trial in trials if isinstance(trial["neurons"], list)]
    even = [trial for trial in trials if isinstance(trial["neurons"], int) and trial["neurons"] < whole]
    assert trials[0] == uneven[0]

    def others(trial: dict[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in trial.items() if field not in ("neurons", "kl")}

    pairs = [(trial, other) for trial in even for other in uneven if others(trial) == others(other)]
    assert pairs  # equal numbers are tried, too
    assert all(sum(other["neurons"]) <= trial["neurons"] * len(other["neurons"]) for trial, other in pairs)
    assert all(count == whole or count % 8 == 0 for trial in uneven for count in trial["neurons"])
    if case == "llama":
        stock = run_slice(case, keep=0.8).manifest
        assert all(isinstance(trial["neurons"], int) for trial in stock["trials"])
