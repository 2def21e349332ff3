"""Cutting key/value heads: what is left is the dense model without the heads that it can best do without."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.algebra.elimination import rank_groups
from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.arch import TABLES
from eigenslice.checkpoint.source import open_source
from eigenslice.data.batches import Batch
from eigenslice.errors import OptionsError
from eigenslice.measure.importance import measure
from eigenslice.model.dense import DenseModel
from eigenslice.stream.runner import captured_inputs
from tests import tiny
from tests.conftest import Folders, Recipe, Slicer
from tests.messages import check_message
from tests.results import load
from tests.runs import run_of

CASES = [name for name, case in tiny.CASES.items() if TABLES[case.model_type].attention.can_cut_heads]
FORMS = [(name, form) for name in CASES for form in ("stock", "custom") if form == "custom" or tiny.CASES[name].stock]


def writers(model: Any, dense: DenseModel) -> list[Any]:
    """The attentions' writers, block by block."""
    layers = model.get_submodule(dense.table.layers)
    return [layer.get_submodule(dense.table.attention.writers[0]) for layer in layers]


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_without_refit_it_is_the_dense_model_without_some_heads(
    case: str, form: str, run_slice: Slicer, dense_folder: Folders, recipe: Recipe
) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    kept = dense.anatomy.kv_head_count - 1
    assert kept > 0
    result = run_slice(case, recipe=recipe(key_value_heads=kept), refit=False, form=form)
    model, sliced = load(dense_folder(case)), load(result.output)
    ids = tiny.random_ids(3, 20)
    with torch.no_grad():
        got = sliced(ids).logits
    before = [writer.weight.data.clone() for writer in writers(model, dense)]
    distances = []
    for gone in itertools.product(range(dense.anatomy.kv_head_count), repeat=dense.anatomy.block_count):
        for writer, weight, head in zip(writers(model, dense), before, gone, strict=True):
            writer.weight.data = weight.clone()
            writer.weight.data.unflatten(1, (dense.anatomy.kv_head_count, -1))[:, head] = 0
        with torch.no_grad():
            expected = model(ids).logits
        distances.append(float((got - expected).abs().max() / expected.abs().max()))
    assert min(distances) < 1e-4
    assert sorted(distances)[1] > 1e-3
    config = result.manifest["plan"]
    assert config["key_value_heads"] == kept
    assert sliced.config.num_key_value_heads == kept
    assert sliced.config.num_attention_heads == dense.config.num_attention_heads // dense.anatomy.kv_head_count * kept
    cut = result.manifest["parameters"]["dense"] - result.manifest["parameters"]["stored"]
    assert cut >= sum(weight.numel() for weight in before) // dense.anatomy.kv_head_count


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_the_heads_that_go_are_those_that_the_others_make_up_for(
    case: str, dense_folder: Folders, tmp_path: Path
) -> None:
    folder, ids = dense_folder(case), tiny.random_ids(12, 24, seed=1)
    dense, model = DenseModel(open_source(str(folder))), load(folder, dtype=torch.float64)
    found = measure(run_of(dense, [Batch(ids[:7]), Batch(ids[7:])], tmp_path))
    for index, writer in enumerate(writers(model, dense)):
        layer = model.model.layers[index]
        with captured_inputs(layer, ["input_layernorm", dense.table.attention.writers[0]]) as seen, torch.no_grad():
            model(ids)
        x, a = (inputs.flatten(0, -2) for inputs in seen.values())
        a = a / (x.square().mean(-1, keepdim=True) + dense.anatomy.eps).sqrt()
        expected = rank_groups(a.T @ a, writer.weight.detach(), dense.anatomy.kv_head_count, DEFAULT_RIDGE)
        assert found.head_order[index].tolist() == expected.tolist()


@pytest.mark.parametrize("heads", [0, 99])
def test_no_such_number_of_heads(heads: int, run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match=f"{heads} key/value heads") as error:
        run_slice("llama", recipe=recipe(key_value_heads=heads))
    check_message(error.value)


def test_heads_that_cannot_be_cut(run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match="0 that can be cut") as error:
        run_slice("opt", recipe=recipe(key_value_heads=1))
    check_message(error.value)


def test_keep_tries_fewer_heads_unless_told_not_to(run_slice: Slicer) -> None:
    tried, whole = (run_slice("llama", keep=0.8, heads=heads).manifest["trials"] for heads in (True, False))
    assert {trial.get("key_value_heads") for trial in tried} > {None}
    assert {trial.get("key_value_heads") for trial in whole} == {None}
