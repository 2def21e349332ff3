"""Cutting key/value heads: what is left is the dense model without the heads that it can best do without."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from eigenslice.algebra.elimination import rank_groups
from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.arch import Table, lookup
from eigenslice.checkpoint.source import open_source
from eigenslice.data.batches import Batch
from eigenslice.errors import OptionsError
from eigenslice.measure.importance import measure
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.stream.runner import captured_inputs
from tests import tiny
from tests.conftest import Folders, Recipe, Slicer
from tests.kept_units import IDS, check_cache, check_logits, columns, kept_units, writers
from tests.messages import check_message
from tests.results import load, size
from tests.runs import run_of

CONFIGS = {
    name: AutoConfig.for_model(case.model_type, **copy.deepcopy(case.config | case.extra))
    for name, case in tiny.CASES.items()
}
CUTTABLE = [name for name, config in CONFIGS.items() if lookup(config).attention.can_cut_heads]
COUNTS = {name: counts.kv for name in CUTTABLE if (counts := lookup(CONFIGS[name]).head_counts(CONFIGS[name]))}
CASES = [name for name in CUTTABLE if COUNTS[name] > 1]
GROUPED = [name for name in CUTTABLE if CONFIGS[name].num_attention_heads > COUNTS[name]]
NORMS_JOIN_HEADS = {"olmoe", "minimax_m2", "olmo2", "olmo3"}
WITH_ALIBI = {"bloom", "mpt", "falcon-sequential"}
OTHER_HEADS = {"gemma4_text"}
UNEVEN = {"deepseek_v2", "deepseek_v2-plain-queries"}
"""Cases whose class refuses a hidden size of 32 with three heads."""
SPANNING = {name for name in CUTTABLE if lookup(CONFIGS[name]).heads_span_width}
"""Cases whose hidden size is heads x head_dim, so that no stock config holds fewer heads beside it."""


def forms_of(cases: list[str], always_custom: set[str]) -> list[tuple[str, str]]:
    """Cases with the forms to ask for: not the custom class again where it is the only one."""
    return [(case, form) for case in cases for form in (("auto",) if case in always_custom else ("auto", "custom"))]


def check_sizes(result: Any, dense: Any, sliced: Any, table: Table, heads: int, kept: int) -> None:
    """The result holds what it says, and the attentions' writers are as narrow as the kept heads."""
    attention = table.attention
    assert result.manifest["parameters"]["stored"] == size(sliced)
    for before, after in zip(writers(dense, table, attention), writers(sliced, table, attention), strict=True):
        assert columns(after, attention).shape[1] == columns(before, attention).shape[1] // heads * kept


@pytest.mark.parametrize(("case", "form"), forms_of(CASES, SPANNING | UNEVEN))
def test_without_refit_it_is_the_dense_model_without_some_heads(
    case: str, form: str, run_slice: Slicer, dense_folder: Folders, recipe: Recipe, none_held_out: CalibrationOptions
) -> None:
    count, table = COUNTS[case], lookup(CONFIGS[case])
    kept = count - table.heads_step
    assert kept > 0
    result = run_slice(case, recipe=recipe(key_value_heads=kept), refit=False, form=form, calibration=none_held_out)
    model, sliced = load(dense_folder(case)), load(result.output)
    group = CONFIGS[case].num_attention_heads // count
    check_sizes(result, model, sliced, table, count, kept)
    for heads in kept_units(model, sliced, table, table.attention, group * count):
        kv_heads = sorted({head // group for head in heads})
        assert len(kv_heads) == kept
        assert heads == [head * group + query for head in kv_heads for query in range(group)]
    check_logits(model, sliced)
    check_cache(sliced)
    assert result.manifest["plan"]["key_value_heads"] == kept
    assert sliced.config.num_attention_heads == CONFIGS[case].num_attention_heads // count * kept
    custom = form == "custom" or case in SPANNING | UNEVEN
    assert result.manifest["form"] == ("custom" if custom else "stock")


@pytest.mark.parametrize(("case", "form"), forms_of(GROUPED, SPANNING))
def test_query_heads_can_be_cut_alone(
    case: str, form: str, run_slice: Slicer, dense_folder: Folders, recipe: Recipe, none_held_out: CalibrationOptions
) -> None:
    count, table = COUNTS[case], lookup(CONFIGS[case])
    queries = CONFIGS[case].num_attention_heads
    group = queries // count
    kept = queries - count
    result = run_slice(case, recipe=recipe(query_heads=kept), refit=False, form=form, calibration=none_held_out)
    model, sliced = load(dense_folder(case)), load(result.output)
    check_sizes(result, model, sliced, table, queries, kept)
    for heads in kept_units(model, sliced, table, table.attention, queries):
        assert heads == sorted(set(heads))
        assert [head // group for head in heads] == [head for head in range(count) for _ in range(group - 1)]
    check_logits(model, sliced)
    check_cache(sliced)
    assert "key_value_heads" not in result.manifest["plan"]
    assert f"| query heads per block | {queries} | {kept} |" in (result.output / "README.md").read_text()
    assert result.manifest["plan"]["query_heads"] == sliced.config.num_attention_heads == kept
    assert result.manifest["form"] == ("custom" if form == "custom" or case in SPANNING else "stock")


def test_all_types_can_lose_heads_but_for_a_reason() -> None:
    whole = {name for name in CONFIGS if name not in CUTTABLE}
    assert whole == NORMS_JOIN_HEADS | WITH_ALIBI | OTHER_HEADS
    assert all(lookup(CONFIGS[name]).attention.why_no_heads for name in whole)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_the_heads_that_go_are_those_that_the_others_make_up_for(
    case: str, dense_folder: Folders, tmp_path: Path
) -> None:
    folder, ids = dense_folder(case), tiny.random_ids(12, 24, seed=1)
    dense, model = DenseModel(open_source(str(folder))), load(folder, dtype=torch.float64)
    found = measure(run_of(dense, [Batch(ids[:7]), Batch(ids[7:])], tmp_path))
    for index, writer in enumerate(writers(model, dense.table, dense.table.attention)):
        layer = model.model.layers[index]
        with captured_inputs(layer, ["input_layernorm", dense.table.attention.writers[0]]) as seen, torch.no_grad():
            model(ids)
        x, a = (inputs.flatten(0, -2) for inputs in seen.values())
        a = a / (x.square().mean(-1, keepdim=True) + dense.anatomy.eps).sqrt()
        expected = rank_groups(a.T @ a, writer.weight.detach(), dense.anatomy.kv_head_count, DEFAULT_RIDGE)
        assert found.head_order[index].tolist() == expected.tolist()


@pytest.mark.parametrize("case", ["falcon", "falcon-new"])
def test_both_kinds_are_cut_and_the_width(case: str, run_slice: Slicer, recipe: Recipe) -> None:
    kv_heads = COUNTS[case] // 2 or 1
    sliced = load(run_slice(case, recipe=recipe(width=20, key_value_heads=kv_heads, query_heads=kv_heads)).output)
    assert sliced.config.num_attention_heads == kv_heads
    table = lookup(CONFIGS[case])
    ends = writers(sliced, table, table.attention)
    assert {columns(writer, table.attention).shape for writer in ends} == {(20, 8 * kv_heads)}
    check_cache(sliced)


def test_folders_of_earlier_versions(run_slice: Slicer, recipe: Recipe) -> None:
    """They hold the dense model's config, and the number of key/value heads beside it."""
    folder = run_slice("qwen3", recipe=recipe(width=24, key_value_heads=1), form="custom").output
    with torch.no_grad():
        expected = load(folder)(IDS).logits
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"key_value_heads": 1}
    for field in ("dense_width", "rotated"):
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    old = load(folder)
    assert (old.config.num_attention_heads, old.config.num_key_value_heads) == (2, 1)
    with torch.no_grad():
        assert torch.equal(old(IDS).logits, expected)


@pytest.mark.parametrize("queries", [0, 3, 8])
def test_no_such_number_of_query_heads(queries: int, run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match=f"{queries} query heads") as error:
        run_slice("llama", recipe=recipe(query_heads=queries))
    check_message(error.value)


def test_heads_that_come_in_fours(run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match="keeps 6 key/value heads") as error:
        run_slice("codegen", recipe=recipe(key_value_heads=6))
    check_message(error.value)


@pytest.mark.parametrize("heads", [0, 99])
def test_no_such_number_of_heads(heads: int, run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match=f"{heads} key/value heads") as error:
        run_slice("llama", recipe=recipe(key_value_heads=heads))
    check_message(error.value)


def test_heads_that_cannot_be_cut(run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match="0 that can be cut") as error:
        run_slice("olmo2", recipe=recipe(key_value_heads=1))
    check_message(error.value)


def test_keep_tries_fewer_heads_unless_told_not_to(run_slice: Slicer) -> None:
    tried, whole = (run_slice("llama", keep=0.8, heads=heads).manifest["trials"] for heads in (True, False))
    assert {trial.get("key_value_heads") for trial in tried} > {None}
    assert {trial.get("query_heads") for trial in tried} > {None}
    assert {trial.get("key_value_heads") for trial in whole} == {trial.get("query_heads") for trial in whole} == {None}
