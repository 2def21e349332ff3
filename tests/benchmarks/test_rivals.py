"""The benchmark's rivals on tiny models: their sizes, their formulas against brute force, and what they leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines import shared_copy, stored
from eigenslice.data.batches import Batch
from eigenslice.errors import EigensliceError
from rivals import RIVALS, flap, parts, refit, slimgpt, wanda
from rivals.sizes import losses, ratio_for, units_of
from rivals.stream import Gram, Moments, Stream
from tests import tiny

CASES = ["llama", "llama-tied", "llama-biased", "mistral-window", "qwen2-tied", "qwen3"]


def model_of(case: str) -> Any:
    return tiny.CASES[case].build()


def batches_of(*shapes: tuple[int, int]) -> list[Batch]:
    return [Batch(tiny.random_ids(*shape, seed=number)) for number, shape in enumerate(shapes)]


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tiny.random_ids(2, 20, seed=9) if ids is None else ids, use_cache=False).logits


def activations(model: Any, batches: list[Batch], block: int) -> Tensor:
    """Inputs (tokens, I) of a dense model's down_proj, in float64."""
    model.requires_grad_(False)
    rows: list[Tensor] = []
    down = model.model.layers[block].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, 1).double()))
    for batch in batches:
        logits(model, batch.input_ids)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("size", [0.9, 0.7])
def test_as_many_parameters_are_stored_as_asked_for(method: str, case: str, size: float) -> None:
    model, batches = model_of(case), batches_of((4, 30))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    most = int(size * stored(model))
    smaller = RIVALS[method](model, batches, most)
    step = 3 * max(units_of(block).neuron_size for block in model.model.layers)  # one neuron of each block
    if method == "flap":
        step = max(units_of(block).head_size for block in model.model.layers)
    assert most - step < stored(smaller) <= most
    assert logits(smaller).isfinite().all()
    assert smaller.lm_head.weight is model.lm_head.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), "the dense model is as it was"


@pytest.mark.parametrize("method", RIVALS)
def test_nothing_changes_at_the_dense_size(method: str) -> None:
    model = model_of("llama-biased")
    same = RIVALS[method](model, batches_of((2, 16)), stored(model))
    assert torch.equal(logits(same), logits(model))
    assert {id(parameter) for parameter in same.parameters()} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("method", ["energy-neurons", "modegpt-mlp", "slimgpt-mlp", "wanda-sp-mlp"])
def test_dead_neurons_go_first(method: str) -> None:
    """Neurons that are always 0 are as many as each block has to lose: the pruned model is the dense one."""
    model = model_of("llama")
    most = int(0.85 * stored(model))
    shares = slimgpt.incremental(3) if method == "slimgpt-mlp" else None
    lost = [neurons for _, neurons in losses(model, most, heads=False, shares=shares)]
    for count, block in zip(lost, model.model.layers, strict=True):
        dead = torch.randperm(56, generator=torch.Generator().manual_seed(count))[:count]
        with torch.no_grad():
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[dead] = 0
    smaller = RIVALS[method](model, batches_of((8, 40)), most)
    assert stored(smaller) < stored(model)
    assert torch.allclose(logits(smaller), logits(model), atol=1e-4)


def test_the_stream_is_the_dense_models_and_leaves_padding_out() -> None:
    model, ids = model_of("mistral-window"), tiny.random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    stream, grams = Stream(model, [Batch(ids, mask)]), []
    for number, block in enumerate(model.model.layers):
        down = block.mlp.down_proj
        grams += [Gram(down), Gram(down)]
        stream.look(number, block, {down: grams[-2].add})
        stream.advance(number, block, {down: grams[-1].add})
        assert torch.equal(grams[-1].sum, grams[-2].sum)
    rows = [activations(model, [Batch(row[None])], 2) for row in (ids[0, 5:], ids[1])]
    expected = sum((part.T @ part for part in rows), torch.zeros(56, 56, dtype=torch.float64))
    assert torch.allclose(grams[-1].sum, expected, rtol=1e-3, atol=1e-4)


def test_the_nystrom_formula_is_least_squares_on_the_same_tokens() -> None:
    model, batches = model_of("llama"), batches_of((4, 40), (3, 20))
    smaller = RIVALS["energy-neurons"](model, batches, int(0.8 * stored(model)))
    for number in range(3):
        rows = activations(model, batches, number)
        dense = model.model.layers[number].mlp.down_proj.weight.double()
        kept = smaller.model.layers[number].mlp.down_proj.in_features
        scores = torch.tensor([float(rows[:, i].square().sum() * dense[:, i].square().sum()) for i in range(56)])
        chosen = sorted(scores.argsort(descending=True)[:kept].tolist())
        up = model.model.layers[number].mlp.up_proj.weight[chosen]
        assert torch.equal(smaller.model.layers[number].mlp.up_proj.weight, up)
        expected = torch.linalg.lstsq(rows[:, chosen], rows @ dense.T).solution.T
        found = smaller.model.layers[number].mlp.down_proj.weight.double()
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_leverage_scores_are_those_of_the_definition() -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = rows.T @ rows
    inverse = torch.linalg.inv(gram + refit.LEVERAGE_RIDGE * torch.eye(12))
    scores = (gram @ inverse).diagonal()
    assert refit.leverage(gram, rows).argsort().tolist() == scores.argsort().tolist()


def least_squares(writer: Tensor, rows: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """Writer of the kept inputs, and the squared error."""
    target = rows @ writer.T
    solution = torch.linalg.lstsq(rows[:, kept], target).solution
    return solution.T, float((rows[:, kept] @ solution - target).square().sum())


def problem(columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(5, columns, generator=generator, dtype=torch.float64), rows


def test_elimination_is_greedy_and_ends_in_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, rows = problem(12)
    monkeypatch.setattr(slimgpt, "SMALLEST", 1)
    expected = list(range(12))
    for _ in range(5):
        errors = {gone: least_squares(writer, rows, [i for i in expected if i != gone])[1] for gone in expected}
        expected.remove(min(errors, key=lambda gone: errors[gone]))
    kept, found = slimgpt.eliminate(writer, rows.T @ rows, 5)
    assert kept.tolist() == expected
    assert torch.allclose(found, least_squares(writer, rows, expected)[0], rtol=1e-5, atol=1e-6)


def test_heads_leave_as_a_whole_and_by_the_costs_of_their_columns() -> None:
    writer, rows = problem(12)
    inverse = torch.linalg.inv(rows.T @ rows)
    costs = []
    for start in range(0, 12, 3):
        cost, h = 0.0, inverse[start : start + 3, start : start + 3].clone()
        for i in range(3):  # one column after the other; the writer stays as it is
            cost += float(writer[:, start + i].square().sum() / h[i, i])
            h = h - h[:, i : i + 1] @ h[i : i + 1] / h[i, i]
        costs.append(cost)
    first = costs.index(min(costs))
    kept, found = slimgpt.eliminate(writer, rows.T @ rows, 1, unit=3)
    assert kept.tolist() == [i for i in range(12) if i // 3 != first]
    assert torch.allclose(found, least_squares(writer, rows, kept.tolist())[0], rtol=1e-5, atol=1e-6)


def test_groups_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns: (80 - 20) / 2, then half of what is over 20 there, which is less than the smallest group."""
    sizes: list[int] = []
    for name, value in {"SMALLEST": 6, "LARGEST": 28, "OVER": 20}.items():
        monkeypatch.setattr(slimgpt, name, value)
    solve = torch.linalg.solve

    def watched(matrix: Tensor, right: Tensor) -> Tensor:
        sizes.append(len(matrix))
        return solve(matrix, right)

    monkeypatch.setattr(torch.linalg, "solve", watched)
    slimgpt.eliminate(torch.ones(1, 90), torch.eye(90), 80)
    assert sizes == [28, *[6] * 8, 4]
    sizes.clear()
    slimgpt.eliminate(torch.ones(1, 90), torch.eye(90), 66)
    assert sizes == [23, *[6] * 7, 1]


def test_ratios_grow_with_the_logarithm() -> None:
    assert slimgpt.incremental(4) == pytest.approx([0.25, 0.625, 0.25 + 0.75 * 0.79248125, 1.0])
    assert slimgpt.incremental(1) == [1.0]
    model = model_of("llama")
    lost = losses(model, int(0.8 * stored(model)), heads=False, shares=slimgpt.incremental(3))
    first, second, third = (neurons for _, neurons in lost)
    assert first / third == pytest.approx(0.25, abs=0.04)
    assert second / third == pytest.approx(0.25 + 0.75 * 0.6309, abs=0.04)


def test_fluctuation_and_its_bias() -> None:
    model, batches = model_of("llama"), batches_of((4, 40), (3, 20))
    smaller = RIVALS["flap-mlp"](model, batches, int(0.9 * stored(model)))
    scores = {}
    for number in range(3):
        rows, dense = activations(model, batches, number), model.model.layers[number].mlp.down_proj.weight.double()
        raw = torch.tensor([float(rows[:, i].var() * dense[:, i].square().sum()) for i in range(56)])
        scores |= {(number, i): float((raw[i] - raw.mean()) / raw.std()) for i in range(56)}
        block = smaller.model.layers[number].mlp
        rows_of = {tuple(row.tolist()): i for i, row in enumerate(model.model.layers[number].mlp.up_proj.weight)}
        kept = [rows_of[tuple(row.tolist())] for row in block.up_proj.weight]
        for i in kept:
            scores[number, i] += 1000
        down = block.down_proj
        bias = torch.zeros(32) if down.bias is None else down.bias
        assert (down.bias is None) == (len(kept) == 56)
        output = rows[:, kept] @ down.weight.double().T + bias.double()
        assert torch.allclose(output.mean(0), (rows @ dense.T).mean(0), atol=1e-5), "the mean output stays"
    ranked = sorted(scores.values())
    gone = sum(value < 500 for value in ranked)
    lowest_kept = min(value - 1000 for value in ranked if value > 500)
    assert 0 < gone < 100
    assert max(ranked[:gone]) < lowest_kept, "the lowest scores of all blocks go"


def test_the_lowest_units_go_and_one_of_each_layer_stays() -> None:
    layers = [flap.Layer(torch.tensor([0.0, 3.0]), 10, 2), flap.Layer(torch.tensor([-1.0, 0.5, 4.0]), 3, 0)]
    assert [part.tolist() for part in flap.lowest(layers, 4)] == [[0], [0]]
    assert [part.tolist() for part in flap.lowest(layers, 12)] == [[0], [0, 1]]
    assert [part.tolist() for part in flap.lowest(layers, 4, [1])] == [[], [0, 1]]
    assert [part.tolist() for part in flap.lowest(layers, 0)] == [[], []]
    with pytest.raises(EigensliceError, match="each layer keeps one unit"):
        flap.lowest(layers, 15)


def test_wanda_counts_weights_and_inputs() -> None:
    writer, rows = problem(6)
    linear = torch.nn.Linear(6, 5)
    moments = Moments(linear)
    moments.add(rows[:120])
    moments.add(rows[120:])
    expected = [sum(abs(float(writer[i, j])) for i in range(5)) / 5 * float(rows[:, j].norm()) for j in range(6)]
    assert wanda.importance(writer, moments).tolist() == pytest.approx(expected)
    assert torch.allclose(moments.variance, rows.var(0))
    assert torch.allclose(moments.mean, rows.mean(0), atol=1e-12)


@pytest.mark.parametrize("case", ["llama", "llama-biased", "qwen3", "llama-head-dim"])
def test_removed_units_are_those_that_add_nothing(case: str) -> None:
    """Heads and neurons that are cut out, against the dense model with zeros in their writers."""
    model, masked = model_of(case), model_of(case)
    pruned = shared_copy(model)
    neurons, heads = torch.tensor([0, 3, 4, 50]), torch.tensor([1])
    for block, other in zip(pruned.model.layers, masked.model.layers, strict=True):
        parts.keep_neurons(block.mlp, neurons)
        parts.keep_heads(block.self_attn, heads)
        with torch.no_grad():
            other.mlp.down_proj.weight[:, [i for i in range(56) if i not in neurons.tolist()]] = 0
            other.self_attn.o_proj.weight[:, : parts.head_columns(other.self_attn)] = 0
    assert torch.allclose(logits(pruned), logits(masked), atol=1e-5)
    assert parts.describe(pruned) == "MLP 4, key/value heads 1"
    units = units_of(model.model.layers[0])
    assert stored(model) - stored(pruned) == 3 * (52 * units.neuron_size + units.head_size)


def test_a_stored_model_is_read_again(tmp_path: Path) -> None:
    for case in ("llama-tied", "llama-biased"):
        model = model_of(case)
        pruned = RIVALS["flap"](model, batches_of((4, 30)), int(0.7 * stored(model)))
        parts.save(model, pruned, tmp_path)
        again = parts.load(model, tmp_path)
        assert torch.equal(logits(again), logits(pruned))
        assert stored(again) == stored(pruned)


def test_ratios_are_found_or_refused() -> None:
    assert ratio_for(lambda ratio: 100 - 50 * ratio, 80) == pytest.approx(0.4)
    assert ratio_for(lambda ratio: 100 - 10 * (10 * ratio // 1), 80) == pytest.approx(0.2)
    assert ratio_for(lambda ratio: 100 - 50 * ratio, 100) == 0


@pytest.mark.parametrize("method", RIVALS)
def test_models_that_can_not_be_pruned_so(method: str) -> None:
    with pytest.raises(EigensliceError, match="keeps one"):
        RIVALS[method](model_of("llama"), batches_of((2, 16)), 100)
    with pytest.raises(EigensliceError, match="opt"):
        RIVALS[method](model_of("opt"), batches_of((2, 16)), 100)
