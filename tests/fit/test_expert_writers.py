"""The writers of experts, against a formula in float64 and against transformers' own experts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenslice.algebra.refit import RIDGES
from eigenslice.arch import lookup
from eigenslice.cut.blocks import Kept
from eigenslice.fit.expert_writers import fit_experts
from eigenslice.stream.runner import has_experts
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.mixtures import ends, experts_of, neurons_of, shared_of
from tests.results import load, relative

EXPERTS, NEURONS, KEPT, WIDTH, EPS = 3, 7, 4, 5, 1e-5


class Inputs:
    """Random inputs of the writers, and the dense stream at the same tokens: two batches for each expert."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = {expert: NEURONS if expert is not None else 2 * NEURONS for expert in (*range(EXPERTS), None)}
        self.parts = {
            (number, expert): (
                torch.randn(30, size, generator=generator, dtype=torch.float64),
                (10 ** torch.randn(30, 1, generator=generator, dtype=torch.float64)).expand(30, WIDTH),
            )
            for number in range(2)
            for expert, size in sizes.items()
        }

    def read(self, number: int, batch: Any, expert: int | None) -> tuple[Tensor, Tensor]:
        return self.parts[number, expert]


def least_squares(base: Tensor, inputs_outputs: Any) -> Tensor:
    """A regression without a ridge, over both batches."""
    pairs = [inputs_outputs(number, None) for number in range(2)]
    a, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert base.shape == (y.shape[1], a.shape[1])
    return torch.linalg.lstsq(a, y).solution.T


def test_each_writer_replaces_its_own_cut_neurons() -> None:
    """W' = argmin of the sum over tokens of |W a - W' a_kept|^2 / mean(x^2), by the normal equations."""
    sublayer = tiny.MLPS["deepseek_v3"]
    generator = torch.Generator().manual_seed(1)
    experts = torch.randn(EXPERTS, WIDTH, NEURONS, generator=generator, dtype=torch.float64)
    shared = torch.randn(WIDTH, 2 * NEURONS, generator=generator, dtype=torch.float64)
    assert sublayer.shared_writer
    names = [sublayer.weight(sublayer.neuron_writer), sublayer.weight(sublayer.shared_writer)]
    chosen = torch.stack([torch.randperm(NEURONS, generator=generator)[:KEPT].sort().values for _ in range(EXPERTS)])
    shared_chosen = torch.arange(0, 2 * NEURONS, 2)
    inputs: Any = Inputs()
    site: Any = SimpleNamespace(eps=EPS)
    fitted = fit_experts(
        site,
        sublayer,
        dict(zip(names, (experts, shared), strict=True)),
        Kept(chosen, shared_chosen),
        inputs,
        least_squares,
    )
    assert list(fitted) == names
    pairs: list[tuple[Any, Tensor, Tensor, Tensor]] = [
        (expert, experts[expert], chosen[expert], fitted[names[0]][expert]) for expert in range(EXPERTS)
    ]
    for expert, writer, kept, found in [*pairs, (None, shared, shared_chosen, fitted[names[1]])]:
        a = torch.cat([inputs.parts[number, expert][0] for number in range(2)])
        x = torch.cat([inputs.parts[number, expert][1] for number in range(2)])
        share = 1 / (x.square().mean(1) + EPS)
        gram = torch.einsum("ti,t,tj->ij", a, share, a)
        expected = writer @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
        torch.testing.assert_close(found, expected)
        assert relative(found, writer[:, kept]) > 0.05


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_fitted_readers_and_attention_lose_less(
    case: str, run_slice: Slicer, dense_folder: Folders, tmp_path: Path
) -> None:
    """Experts are only rotated, and yet, on text with a structure, the fit gets nearer to the dense model."""
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


def check_fitted(actual: torch.Tensor, inner: torch.Tensor, writer: torch.Tensor, count: int) -> None:
    """A writer W (width, count) against the formula, in float64; a basis leaves W^T W as it is.

    Args:
        actual: What was stored.
        inner: What the dense writer reads, (n, neurons), each token as it counts.
        writer: The dense one.
        count: Neurons that are kept.
    """
    kept = (inner.square().sum(0) * writer.square().sum(0)).topk(count).indices.sort().values
    gram = inner[:, kept].T @ inner[:, kept]
    missing = inner[:, kept].T @ inner @ writer.T - gram @ writer[:, kept].T
    errors = []
    for ridge in RIDGES:  # which one is chosen, the tests of the fits look at
        regular = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
        expected = writer[:, kept] + torch.linalg.solve(regular, missing).T
        errors.append(relative(actual.T @ actual, expected.T @ expected))
    assert min(errors) < 1e-4
    assert relative(actual.T @ actual, writer[:, kept].T @ writer[:, kept]) > 5e-3


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_neurons_and_writers_are_those_of_a_formula(
    case: str, run_slice: Slicer, dense_folder: Folders, calibration: Path
) -> None:
    """From hooks on transformers' first block with experts: at full width nothing is lost before it."""
    ids = load_file(calibration)["calibration"]
    model = load(dense_folder(case), dtype=torch.float64, experts_implementation="eager")
    table, seen = lookup(model.config), {}
    layers, mlp, experts = model.get_submodule(table.layers), table.mlp, experts_of(model)[0]
    number, layer = next((n, layer) for n, layer in enumerate(layers) if has_experts(layer, mlp))
    layer.get_submodule(mlp.norm).register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    experts.register_forward_pre_hook(lambda module, args: seen.update(routed=args))
    for module in shared_of(model)[:1]:
        module.register_forward_pre_hook(lambda module, args: seen.update(shared=args[0]))
    with torch.no_grad():
        model(ids)
    x, (hidden, index, weights) = seen["x"].flatten(0, 1), seen["routed"]
    size = (x.square().mean(-1, keepdim=True) + table.epsilon(model.config)).sqrt()
    count = neurons_of(model).pop() - 8
    result = load_file(run_slice(case, width=tiny.WIDTH, neurons=count, form="custom").output / "model.safetensors")
    names = [name for name in (mlp.neuron_writer, mlp.shared_writer) if name]
    stored = {name: result[f"model.{table.layers}.{number}.{mlp.weight(name)}"].double() for name in names}
    for expert, (reader, writer) in enumerate(zip(*ends(experts, mlp), strict=True)):
        tokens, place = torch.where(index == expert)
        rows = hidden[tokens] @ reader.T
        if case == "gpt_oss":
            rows = rows + experts.gate_up_proj_bias[expert]
            gate, up = rows[:, ::2].clamp(max=experts.limit), rows[:, 1::2].clamp(-experts.limit, experts.limit)
            inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            gate, up = rows.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
        actual = stored[mlp.neuron_writer][expert]
        inner = (inner * weights[tokens, place, None] / size[tokens]).detach()
        check_fitted(actual.T if mlp.transposed else actual, inner, writer, count)
    if mlp.shared_writer:
        module, inner = shared_of(model)[0], seen["shared"].flatten(0, 1) / size
        check_fitted(stored[mlp.shared_writer], inner, module.weight.detach(), 2 * count)
