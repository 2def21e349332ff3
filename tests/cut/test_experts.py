"""Mixtures of experts: how experts are stored, and which neurons are cut."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenslice.arch import lookup
from eigenslice.checkpoint.source import open_source
from eigenslice.errors import CheckpointError
from eigenslice.model.dense import DenseModel
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.mixtures import ends, experts_of, neurons_of, shared_of
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


@pytest.mark.parametrize("case", CUTTABLE)
def test_experts_lose_neurons(case: str, run_slice: Slicer, dense_folder: Folders) -> None:
    """The result is as stock as with all of them; what isn't an expert stays whole."""
    dense = load(dense_folder(case))
    (whole,) = neurons_of(dense)
    result = run_slice(case, width=tiny.WIDTH, neurons=whole - 8)
    manifest, model = result.manifest, load(result.output)
    stored = sum(map(math.prod, stored_tensors(result.output).values()))
    assert manifest["parameters"]["stored"] == stored == size(model)
    assert manifest["form"] == "stock"
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
