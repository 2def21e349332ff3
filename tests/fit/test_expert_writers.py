"""The writers of experts, against a formula in float64 and against transformers' own experts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenslice.algebra.refit import RidgeChoice
from eigenslice.arch import lookup
from eigenslice.fit import expert_writers
from eigenslice.fit.expert_writers import SWEEPS, fit_experts
from eigenslice.stream.runner import has_experts
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.mixtures import ends, experts_of, neurons_of, shared_of
from tests.results import load, relative

EXPERTS, NEURONS, WIDTH, EPS, RIDGE = 3, 7, 5, 1e-5, 0.03


class Inputs:
    """Random inputs of the writers in two batches of 40 tokens; an expert gets about half of the tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = 0.5 + torch.rand(2, 40, 1, generator=generator, dtype=torch.float64).expand(2, 40, WIDTH)
        self.parts = {
            (number, expert): (
                torch.where(torch.rand(40, generator=generator) < (2 if expert is None else 0.5))[0],
                torch.randn(40, NEURONS, generator=generator, dtype=torch.float64),
            )
            for number in range(2)
            for expert in (*range(EXPERTS), None)
        }

    def read(self, number: int, expert: int | None) -> tuple[Tensor, Tensor]:
        tokens, rows = self.parts[number, expert]
        return tokens, rows[tokens]


def test_all_writers_together_come_to_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and again: the error becomes that of one regression with all inputs beside each other."""
    inputs, generator = Inputs(), torch.Generator().manual_seed(1)
    numbers = (*range(EXPERTS), None)
    writers: Any = {n: torch.randn(WIDTH, NEURONS, generator=generator, dtype=torch.float64) for n in numbers}
    missing: Any = list(torch.randn(2, 40, WIDTH, generator=generator, dtype=torch.float64))
    batches: Any = [SimpleNamespace(rows=lambda x: x, hidden=hidden) for hidden in inputs.hidden]

    def least_squares(base: Tensor, inputs_outputs: Any) -> Tensor:
        pairs = [inputs_outputs(number, batch) for number, batch in enumerate(batches)]
        a, y = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert base.shape == (y.shape[1], a.shape[1])
        return torch.linalg.lstsq(a, y).solution.T

    design = torch.zeros(80, 4 * NEURONS, dtype=torch.float64)
    for (number, expert), (tokens, rows) in inputs.parts.items():
        place = NEURONS * numbers.index(expert)
        design[tokens + 40 * number, place : place + NEURONS] = rows[tokens]
    written = design @ torch.cat(list(writers.values()), dim=1).T
    target = torch.cat(missing) + written
    share = (inputs.hidden.flatten(0, 1).square().mean(1, keepdim=True) + EPS).rsqrt()
    best = share * (target - design @ torch.linalg.lstsq(share * design, share * target).solution)

    errors = []
    for sweeps in (1, 2, 400):
        monkeypatch.setattr(expert_writers, "SWEEPS", sweeps)
        left = list(missing)
        fitted = fit_experts(SimpleNamespace(eps=EPS), writers, inputs, left, least_squares)  # pyright: ignore
        actual = target - design @ torch.cat(list(fitted.values()), dim=1).T
        torch.testing.assert_close(torch.cat(left), actual)
        errors.append(float((share * actual).norm() / best.norm()))
    assert (share * torch.cat(missing)).norm() / best.norm() > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1 + 1e-6


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_fitted_readers_and_attention_lose_less(
    case: str, run_slice: Slicer, dense_folder: Folders, tmp_path: Path
) -> None:
    """On text with a structure, the fit gets nearer to the dense model."""
    data = tmp_path / "structured.safetensors"
    save_file({"calibration": tiny.structured_ids(48, 24, seed=1)}, data)
    ids = tiny.structured_ids(8, 24, seed=2)
    errors = []
    for refit in (False, True):
        options = {"calibration": {"data": str(data)}, "width": 24, "refit": refit}
        with torch.no_grad():
            result = load(run_slice(case, **options).output)(ids).logits
            errors.append(relative(result, load(dense_folder(case))(ids).logits))
    assert errors[1] < 0.95 * errors[0]


def ridge(inner: Tensor, outputs: Tensor, base: Tensor) -> Tensor:
    """The W that minimizes |Y - A W^T|^2 + r |W - base|^2."""
    gram = inner.T @ inner
    regular = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return base + torch.linalg.solve(regular, inner.T @ (outputs - inner @ base.T)).T


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_neurons_and_writers_are_those_of_a_formula(
    case: str, run_slice: Slicer, dense_folder: Folders, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From hooks on transformers' first block with experts: at full width nothing is lost before it.

    A basis leaves W^T W as it is.
    """
    monkeypatch.setattr(RidgeChoice, "choose", lambda *_: RIDGE)
    ids = load_file(calibration)["calibration"]
    model = load(dense_folder(case), dtype=torch.float64, experts_implementation="eager")
    table, seen = lookup(model.config), {}
    layers, mlp, experts = model.get_submodule(table.layers), table.mlp, experts_of(model)[0]
    number, layer = next((n, layer) for n, layer in enumerate(layers) if has_experts(layer, mlp))
    layer.get_submodule(mlp.norm).register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda module, args, output: seen.update(after=output))
    experts.register_forward_pre_hook(lambda module, args: seen.update(routed=args))
    for module in shared_of(model)[:1]:
        module.register_forward_pre_hook(lambda module, args: seen.update(shared=args[0]))
    with torch.no_grad():
        model(ids)
    x, after, (hidden, index, weights) = seen["x"].flatten(0, 1), seen["after"].flatten(0, 1), seen["routed"]
    eps = table.epsilon(model.config)
    before, behind = ((stream.square().mean(-1, keepdim=True) + eps).sqrt() for stream in (x, after))
    count = neurons_of(model).pop() - 8
    result = load_file(run_slice(case, width=tiny.WIDTH, neurons=count, form="custom").output / "model.safetensors")
    names = [name for name in (mlp.neuron_writer, mlp.shared_writer) if name]
    stored = {name: result[f"model.{table.layers}.{number}.{mlp.weight(name)}"].double() for name in names}
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for expert, (_, writer) in enumerate(zip(*ends(experts, mlp), strict=True)):
        tokens, place = torch.where(index == expert)
        actual = stored[mlp.neuron_writer][expert]
        inner = (inner_of(case, experts, expert, hidden[tokens]) * weights[tokens, place, None]).detach()
        parts.append((tokens, inner, writer, actual.T if mlp.transposed else actual))
    if mlp.shared_writer:
        inner = seen["shared"].flatten(0, 1)
        parts.append((torch.arange(len(x)), inner, shared_of(model)[0].weight.detach(), stored[mlp.shared_writer]))
    check_parts(parts, before, behind, count)


def inner_of(case: str, experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """Return the input of an expert's writer, from transformers' weights."""
    rows = hidden @ ends(experts, tiny.MLPS[case])[0][expert].T
    if case != "gpt_oss":
        gate, up = rows.chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    rows = rows + experts.gate_up_proj_bias[expert]
    gate, up = rows[:, ::2].clamp(max=experts.limit), rows[:, 1::2].clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)


def check_parts(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], before: Tensor, behind: Tensor, count: int) -> None:
    """Check the stored writers of a mixture.

    Args:
        parts: For each expert, its tokens, the input of its writer, the dense writer, and the stored one.
        before: Norm of the stream before the mixture, by tokens.
        behind: Norm of the stream behind it.
        count: Neurons that are kept, of eight more.
    """
    missing, fitted, inputs = torch.zeros(len(before), parts[0][2].shape[0], dtype=torch.float64), [], []
    for tokens, inner, writer, _ in parts:  # at first, what the cut neurons wrote is missing
        energy = (inner / before[tokens]).square().sum(0) * writer.square().sum(0)
        kept = energy.topk(count * inner.shape[1] // (count + 8)).indices.sort().values
        missing.index_add_(0, tokens, inner @ writer.T - inner[:, kept] @ writer[:, kept].T)
        fitted.append(writer[:, kept])
        inputs.append(inner[:, kept])
    start = list(fitted)
    for _ in range(SWEEPS):
        for n, (tokens, *_) in enumerate(parts):
            target = missing[tokens] + inputs[n] @ fitted[n].T
            better = ridge(inputs[n] / behind[tokens], target / behind[tokens], fitted[n])
            missing.index_add_(0, tokens, inputs[n] @ (better - fitted[n]).T, alpha=-1)
            fitted[n] = better
    for (*_, actual), expected, unfitted in zip(parts, fitted, start, strict=True):
        assert relative(actual.T @ actual, expected.T @ expected) < 1e-4
        assert relative(actual.T @ actual, unfitted.T @ unfitted) > 5e-3
