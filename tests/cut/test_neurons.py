"""MLP neurons cut: sizes, forms, which ones are kept, and recipes with a number for each block."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.arch import TABLES, lookup
from eigenslice.errors import OptionsError
from eigenslice.modeling import SlicedForCausalLM
from tests import tiny
from tests.conftest import Folders, Recipe, Slicer
from tests.results import load, relative, size, stored_tensors

IDS = tiny.random_ids(2, 20, seed=5)
PER_BLOCK = (40, 17, 56)
FIELD = {
    "opt": "ffn_dim",
    "xglm": "ffn_dim",
    "falcon": "ffn_hidden_size",
    "gpt_neo": "intermediate_size",
} | dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "codegen"), "n_inner")
FAMILIES = ["llama", "qwen2-tied", "qwen3", "opt", "phi", "gpt_neox", "gpt_neox-sequential"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def mlp_shapes(model: Any) -> list[tuple[int, int]]:
    """(inputs, neurons) of each block's MLP, by the weights of transformers' modules."""
    table = lookup(getattr(model.config, "text_config", model.config))
    inner = model.model if isinstance(model, SlicedForCausalLM) else model
    shapes = []
    for layer in inner.get_submodule(table.layers):
        sizes = {}
        writers = (*table.mlp.writers, *table.mlp.normed_writers)
        for name in (*table.mlp.readers, *writers):
            module = layer.get_submodule(name)
            outputs, inputs = table.mlp.transpose_shape(name, tuple(module.weight.shape))
            assert module.bias is None or len(module.bias) == outputs
            if isinstance(module, torch.nn.Linear):
                assert (outputs, inputs) == (module.out_features, module.in_features)
            sizes[name] = (outputs // 2 if name in table.mlp.gated else outputs, inputs)
        readers = {sizes[name] for name in table.mlp.readers}
        ((neurons, inputs),) = readers
        assert {sizes[name][1] for name in writers} == {neurons}
        shapes.append((inputs, neurons))
    return shapes


def test_some_neurons_stay(run_slice: Slicer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TABLES, "llama", replace(TABLES["llama"], mlp=replace(TABLES["llama"].mlp, can_cut_neurons=False))
    )
    with pytest.raises(OptionsError, match=r"none: this architecture's can't be cut"):
        run_slice("llama", width=24, neurons=40)


@pytest.mark.parametrize("case", tiny.WITH_NEURONS)
def test_full_width_with_neurons_cut(case: str, run_slice: Slicer, dense_folder: Folders) -> None:
    result = run_slice(case, width=tiny.WIDTH, neurons=40)
    manifest, model, stored = result.manifest, load(result.output), stored_tensors(result.output)
    counts = manifest["parameters"]
    assert counts["stored"] == sum(map(math.prod, stored.values())) == sum(counts["by_role"].values())
    assert counts["stored"] == size(model) < counts["dense"]
    assert mlp_shapes(model) == [(tiny.WIDTH, 40)] * 3
    expected = None if case == "mpt" else tiny.CASES[case].stock_at_full_width  # MPT has four times the width
    assert manifest["model_type"] == model.config.model_type == (expected or "eigenslice")
    assert manifest["form"] == ("stock" if expected else "custom")
    if expected:
        config = json.loads((result.output / "config.json").read_text())
        assert config[FIELD.get(expected, "intermediate_size")] == 40
        assert config["hidden_size"] == tiny.WIDTH
    tied = tiny.CASES[case].tied
    assert manifest["plan"] == {"basis": "global", "width": tiny.WIDTH, "neurons": 40, "tied": tied}
    assert relative(logits(model), logits(load(dense_folder(case)))) < 0.6


def test_both_are_cut(run_slice: Slicer) -> None:
    model = load(run_slice("phi", width=24, neurons=40).output)
    assert mlp_shapes(model) == [(24, 40)] * 3
    model = load(run_slice("llama", slicing=0.25, neurons=9).output)
    assert mlp_shapes(model) == [(24, 9)] * 3


def test_all_neurons_by_number_is_all_neurons(run_slice: Slicer) -> None:
    one, two = (
        load_file(run_slice("llama", width=24, **o).output / "model.safetensors") for o in ({}, {"neurons": 56})
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_number_for_each_block(case: str, run_slice: Slicer, recipe: Recipe, tmp_path: Path) -> None:
    result = run_slice(case, recipe=recipe(width=24, neurons=PER_BLOCK))
    manifest, model = result.manifest, load(result.output)
    assert (manifest["form"], manifest["model_type"]) == ("custom", "eigenslice")
    assert manifest["plan"]["neurons"] == list(PER_BLOCK)
    assert mlp_shapes(model) == [(24, neurons) for neurons in PER_BLOCK]
    stored = sum(map(math.prod, stored_tensors(result.output).values()))
    assert manifest["parameters"]["stored"] == stored == size(model)

    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert mlp_shapes(again) == mlp_shapes(model)
    assert torch.equal(logits(again), logits(model))

    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    ids = tiny.random_ids(1, 9, seed=7)
    ones = torch.ones_like(ids)
    cached, plain = (model.generate(ids, attention_mask=ones, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_number_for_each_block_is_near_the_dense_model(
    case: str, run_slice: Slicer, dense_folder: Folders, recipe: Recipe
) -> None:
    """The more neurons in one block, the nearer; all of them are exact."""
    dense = logits(load(dense_folder(case)))
    errors = []
    for middle in (8, 32, 56):
        path = recipe(width=tiny.WIDTH, neurons=[56, middle, 56])
        errors.append(relative(logits(load(run_slice(case, recipe=path).output)), dense))
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-4


@pytest.fixture
def with_idle_neurons(tmp_path: Path) -> Callable[[str, list[int]], Path]:
    """A case's model in which some MLP neurons do nothing, the same ones in all blocks."""

    def build(case: str, idle: list[int]) -> Path:
        model = tiny.CASES[case].build()
        table = lookup(model.config)
        for layer in model.get_submodule(table.layers):
            weight = layer.get_submodule(table.mlp.neuron_writer).weight
            # What is the same for all coordinates is nothing behind a LayerNorm
            weight.data[:, idle] = 3.0 if table.norm == "layer" else 0.0
        return tiny.save(model, tmp_path / "idle")

    return build


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize(
    "case",
    ["llama-biased", "qwen2-tied", "qwen3", "opt", "phi", "gpt_neox", "gpt_neox-sequential", *tiny.POST_NORMS],
)
def test_neurons_that_do_nothing_are_cut_first(
    case: str, refit: bool, run_slice: Slicer, with_idle_neurons: Callable[[str, list[int]], Path]
) -> None:
    folder = with_idle_neurons(case, [0, *range(7, 50, 6), 55])  # 10 of 56
    dense = logits(load(folder))
    exact = run_slice(case, model=str(folder), width=tiny.WIDTH, neurons=46, refit=refit)
    assert (logits(load(exact.output)) - dense).abs().max() <= 1e-4 * dense.abs().max()
    one_less = run_slice(case, model=str(folder), width=tiny.WIDTH, neurons=45, refit=refit)
    assert (logits(load(one_less.output)) - dense).abs().max() > 1e-3 * dense.abs().max()


def test_idle_neurons_by_name(run_slice: Slicer, with_idle_neurons: Callable[[str, list[int]], Path]) -> None:
    """Without refit, full width, up to the basis: rows of the up projection are the dense ones of those kept."""
    idle = [3, 20, 21, 55]
    folder = with_idle_neurons("llama", idle)
    result = run_slice("llama", model=str(folder), width=tiny.WIDTH, neurons=52, refit=False)
    dense, sliced = (load_file(path / "model.safetensors") for path in (folder, result.output))
    kept = [number for number in range(56) if number not in idle]
    for index in range(3):
        prefix = f"model.layers.{index}."
        gain = dense[prefix + "post_attention_layernorm.weight"]
        for name in ("gate_proj", "up_proj"):
            norms = (dense[f"{prefix}mlp.{name}.weight"] * gain).norm(dim=1)
            torch.testing.assert_close(sliced[f"{prefix}mlp.{name}.weight"].norm(dim=1), norms[kept])
        norms = dense[prefix + "mlp.down_proj.weight"].norm(dim=0)
        torch.testing.assert_close(sliced[prefix + "mlp.down_proj.weight"].norm(dim=0), norms[kept])
