"""Mixtures of experts: how their experts are stored, and what is fitted."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenslice.checkpoint.source import open_source
from eigenslice.dense import DenseModel
from eigenslice.errors import CheckpointError
from tests import tiny
from tests.conftest import Folders, Slicer, load, relative, stored_tensors

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
