"""Mixtures of experts: how their experts are stored, and what is fitted."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenslice.algebra.refit import RIDGES
from eigenslice.arch import Sublayer, Table, lookup
from eigenslice.checkpoint.source import open_source
from eigenslice.errors import CheckpointError
from eigenslice.model.dense import DenseModel
from eigenslice.modeling import SlicedForCausalLM
from eigenslice.stream.runner import has_experts
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load, relative, size, stored_tensors

CUTTABLE = [case for case, mlp in tiny.MLPS.items() if mlp.can_cut_neurons and mlp.stacked]
STOCK = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss", "llama4_text", "minimax_m2"]
IDS = tiny.random_ids(2, 20, seed=5)


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # pyright: ignore


@pytest.mark.parametrize("case", STOCK)
def test_stock_results_store_experts_as_the_checkpoint_does(
    case: str, run_slice: Slicer, dense_folder: Folders
) -> None:
    """Under the same names: what llama.cpp and vLLM read is the hub's form."""
    dense = dense_folder(case)
    stored = stored_tensors(run_slice(case, width=24).output)
    assert stored.keys() == stored_tensors(dense).keys()
    if case == "mixtral":
        assert stored["model.layers.0.block_sparse_moe.experts.3.w1.weight"] == (56, 24)
        assert stored["model.layers.0.block_sparse_moe.experts.3.w2.weight"] == (24, 56)


# llama4_text has one way to run experts only
@pytest.mark.parametrize("case", [case for case in STOCK if case != "llama4_text"])
def test_stock_results_run_with_the_default_expert_kernels(
    case: str, run_slice: Slicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 they want rows of 16 bytes, so widths that are multiples of eight. Each expert's matrix by itself,
    in float32, is the reference."""
    used, kernel = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kw: used.append(1) or kernel(*args, **kw))
    folder = run_slice(case, width=24, dtype="bfloat16").output
    model, exact = load(folder, dtype=torch.bfloat16), load(folder, dtype=torch.float32)
    exact.set_experts_implementation("eager")
    # A router's choice may hang on the rounding to bfloat16: nearly all tokens have to agree, not each
    result = logits(model).float()
    assert used
    expected = logits(exact)
    assert ((result - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.03


@pytest.mark.parametrize("form", ["stock", "custom"])
def test_widths_that_the_default_kernel_refuses_are_warned_of(form: str, run_slice: Slicer) -> None:
    result = run_slice("mixtral", width=20, dtype="bfloat16", form=form)
    assert "aren't multiples of 8" in result.manifest["warning"]
    model = load(result.output, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        model(IDS)
    assert load(result.output, dtype=torch.bfloat16, experts_implementation="eager")(IDS).logits.isfinite().all()
    assert not run_slice("mixtral", width=20, form=form).manifest["warning"]


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "olmoe"])
def test_a_custom_result_survives_saving_it_again(case: str, run_slice: Slicer, tmp_path: Path) -> None:
    model = load(run_slice(case, width=24, form="custom").output)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


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


def table_of(model: Any) -> Table:
    return lookup(getattr(model.config, "text_config", model.config))


def inside_mixtures(model: Any, name: str) -> list[Any]:
    """A module of each layer that has experts."""
    table, inner = table_of(model), model.model if isinstance(model, SlicedForCausalLM) else model
    layers = inner.get_submodule(table.layers)
    return [layer.get_submodule(name) for layer in layers if has_experts(layer, table.mlp)]


def experts_of(model: Any) -> list[Any]:
    """Experts of the layers that have them."""
    return inside_mixtures(model, table_of(model).mlp.experts)


def shared_of(model: Any) -> list[Any]:
    """Writers of the shared experts that lose neurons together with the others."""
    name = table_of(model).mlp.shared_writer
    return inside_mixtures(model, name) if name else []


def ends(experts: Any, mlp: Sublayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Readers (experts, 2 x neurons, width) and writers (experts, width, neurons), as views."""
    weights = (getattr(experts, name.rpartition(".")[2]).data for name in mlp.stacked)
    reader, writer = (weight.transpose(-1, -2) if mlp.transposed else weight for weight in weights)
    return reader, writer


def neurons_of(model: Any) -> set[int]:
    """Neurons of all experts, by what their readers give and what their writers take."""
    mlp = table_of(model).mlp
    pairs = [ends(experts, mlp) for experts in experts_of(model)]
    return {count for reader, writer in pairs for count in (reader.shape[1] // 2, writer.shape[2])}


@pytest.mark.parametrize("case", CUTTABLE)
def test_experts_lose_neurons(case: str, run_slice: Slicer, dense_folder: Folders) -> None:
    """The result is as stock as with all of them; what isn't an expert stays whole."""
    dense = load(dense_folder(case))
    (whole,) = neurons_of(dense)
    result = run_slice(case, width=tiny.WIDTH, neurons=whole - 8)
    manifest, model = result.manifest, load(result.output)
    stored = sum(map(math.prod, stored_tensors(result.output).values()))
    assert manifest["parameters"]["stored"] == stored == size(model)
    assert manifest["form"] == ("stock" if tiny.CASES[case].stock else "custom")
    assert manifest["plan"]["neurons"] == whole - 8
    assert neurons_of(model) == {whole - 8}
    assert len(experts_of(model)) == len(experts_of(dense)) > 0
    for one, other in zip(shared_of(dense), shared_of(model), strict=True):
        assert other.in_features * whole == one.in_features * (whole - 8)
    assert 1e-3 < relative(logits(model), logits(dense)) < 0.6


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("case", CUTTABLE)
def test_idle_neurons_of_experts_are_cut_first(case: str, refit: bool, run_slice: Slicer, tmp_path: Path) -> None:
    """Each expert has idle neurons of its own; without them, the logits are the dense model's."""
    model = tiny.CASES[case].build()
    table = lookup(model.config)
    generator = torch.Generator().manual_seed(0)
    (whole,) = neurons_of(model)
    for experts in experts_of(model):
        for writer in ends(experts, table.mlp)[1]:  # what is the same for all coordinates is nothing behind a LayerNorm
            writer[:, torch.randperm(whole, generator=generator)[:8]] = 3.0 if table.norm == "layer" else 0.0
    for module in shared_of(model):  # they have a multiple
        idle = torch.randperm(module.in_features, generator=generator)[: 8 * module.in_features // whole]
        module.weight.data[:, idle] = 0.0
    folder, dense = tiny.save(model, tmp_path / "idle"), logits(model)
    exact = run_slice(case, model=str(folder), width=tiny.WIDTH, neurons=whole - 8, refit=refit)
    assert (logits(load(exact.output)) - dense).abs().max() <= 1e-4 * dense.abs().max()
    fewer = run_slice(case, model=str(folder), width=tiny.WIDTH, neurons=whole - 9, refit=refit)
    assert "numbers of neurons in float32 that aren't multiples of 4" in fewer.manifest["warning"]
    model = load(fewer.output, experts_implementation="eager")
    assert (logits(model) - dense).abs().max() > 1e-3 * dense.abs().max()


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
def test_neurons_and_writers_are_those_of_a_formula(case: str, run_slice: Slicer, dense_folder: Folders) -> None:
    """From hooks on transformers' first block with experts: at full width nothing is lost before it."""
    ids = load_file(tiny.calibration_file(dense_folder(case)))["calibration"]
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


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_a_size_is_reached_by_cutting_experts(case: str, run_slice: Slicer) -> None:
    manifest = run_slice(case, keep=0.7, multiple=4).manifest
    assert manifest["parameters"]["kept"] <= 0.7
    assert manifest["form"] == "stock"
    tried = [trial["neurons"] for trial in manifest["trials"]]
    assert min(tried) < manifest["dense_neurons"]


def test_a_missing_expert_is_refused(dense_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense_folder("mixtral"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"block_sparse_moe\.experts\.0\.w2\.weight is \(3, 32, 56\), the config"):
        DenseModel(open_source(str(folder)))
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the config says"):
        DenseModel(open_source(str(folder)))


@pytest.mark.parametrize("form", ["stock", "custom"])
def test_a_routers_correction_keeps_its_precision(form: str, run_slice: Slicer, tmp_path: Path) -> None:
    """It decides between experts, and transformers holds it in float32 beside weights in bfloat16."""
    folder = tiny.save(tiny.CASES["deepseek_v3"].build(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    half = {key: tensor if key.endswith("correction_bias") else tensor.bfloat16() for key, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    stored = load_file(run_slice("deepseek_v3", model=str(folder), width=24, form=form).output / "model.safetensors")
    prefix = "" if form == "stock" else "model."
    assert torch.equal(stored[prefix + name], tensors[name])
    assert stored[prefix + name].dtype == torch.float32
    assert stored[prefix + "model.embed_tokens.weight"].dtype == torch.bfloat16
