"""Plans from sizes and from recipes."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from eigenslice.checkpoint.source import open_source
from eigenslice.errors import OptionsError
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.candidates import make_plans
from eigenslice.plan.forms import choose_form
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import Plan, Sizes
from eigenslice.plan.result_config import checked_config, stock_config
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.messages import check_message
from tests.results import load

RecipeText = Callable[[str], Path]
Planner = Callable[..., tuple[DenseModel, list[Plan]]]
FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "opt", "phi", "gpt_neox", "gpt_neox-sequential"]


@pytest.fixture
def plans(dense_folder: Folders) -> Planner:
    """Gives a case's dense model and the plans that options lead to."""

    def make(case: str | Path, **options: Any) -> tuple[DenseModel, list[Plan]]:
        folder = case if isinstance(case, Path) else dense_folder(case)
        dense = DenseModel(open_source(str(folder)))
        options = {"model": str(folder), "output": Path("out"), "heads": False, "depth": False} | options
        (family,) = make_plans(dense.anatomy, SliceOptions(**options))
        return dense, family

    return make


def size(plan: Plan) -> tuple[int, int]:
    """The only width and the only number of neurons."""
    (width,), (neurons,) = set(plan.site_widths), set(plan.neurons_per_block)
    return width, neurons


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6, 0.5, 0.4])
@pytest.mark.parametrize("case", FAMILIES)
def test_all_plans_are_of_the_size_that_was_asked_for(case: str, keep: float, plans: Planner) -> None:
    dense, found = plans(case, keep=keep)
    budget = keep * dense.anatomy.parameters
    assert found
    assert len({size(plan) for plan in found}) == len(found)
    for plan in found:
        width, neurons = size(plan)
        assert stored_parameters(dense.anatomy, plan) <= budget
        assert plan == choose_form(dense.anatomy, Sizes(width, neurons), tied=dense.anatomy.tied)
        assert neurons >= dense.anatomy.neuron_count / 4
        more = [(width, min(56, neurons + 8))] if neurons < 56 else [(min(32, width + 8), 56)]
        for wider, additional in more:  # and a step more wouldn't fit
            if (wider, additional) != (width, neurons):
                other = choose_form(dense.anatomy, Sizes(wider, additional), tied=dense.anatomy.tied)
                assert stored_parameters(dense.anatomy, other) > budget


def test_plans_go_from_neurons_only_to_width_only(plans: Planner) -> None:
    sizes = sorted(map(size, plans("llama", keep=0.7)[1]))
    assert [width for width, _ in sizes] == [16, 24, 32]
    assert [neurons for _, neurons in sizes] == sorted((neurons for _, neurons in sizes), reverse=True)
    assert sizes[0][1] == 56 > sizes[-1][1]
    assert tiny.WIDTH not in [size(plan)[0] for plan in plans("llama", keep=0.5)[1]], "too few neurons would be left"


@pytest.mark.parametrize("options", [{"mlp": False}, {"basis": "per-block"}], ids=["no-mlp", "per-block"])
def test_neurons_stay_where_they_are_not_to_be_cut(options: dict, plans: Planner) -> None:
    (plan,) = plans("llama", keep=0.8, **options)[1]
    assert plan.neurons_per_block == (56, 56, 56)
    assert plan.site_widths[0] < 32


@pytest.mark.parametrize(("width", "heads"), [(30, 5), (28, 7), (45, 5), (12, 2), (37, 1)])
@pytest.mark.parametrize("keep", [0.97, 0.9, 0.8, 0.6])
def test_no_plan_is_wider_than_the_model(width: int, heads: int, keep: float, plans: Planner, tmp_path: Path) -> None:
    """Widths that don't divide by 8 are rounded, never up."""
    config = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 6}
    folder = tiny.save(tiny.tiny_model("llama", tiny.LLAMA | config), tmp_path / "odd")
    dense, found = plans(folder, keep=keep)
    assert all(size(plan)[0] <= width for plan in found)
    assert all(stored_parameters(dense.anatomy, plan) <= keep * dense.anatomy.parameters for plan in found)


@pytest.mark.parametrize("neurons", [6, 8, 9])
def test_few_neurons_are_kept_by_at_least_eight(neurons: int, plans: Planner, tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", tiny.LLAMA | {"intermediate_size": neurons})
    _, found = plans(tiny.save(model, tmp_path / "few"), keep=0.7)
    assert all(min(plan.neurons_per_block) >= min(8, neurons) for plan in found)


def test_options_that_fix_the_plan_give_one(plans: Planner) -> None:
    for options, expected in [
        ({"width": 24}, (24, 56)),
        ({"slicing": 0.25, "neurons": 33}, (24, 33)),
        ({"width": 23, "neurons": 1}, (23, 1)),
    ]:
        (plan,) = plans("llama", **options)[1]
        assert size(plan) == expected


@pytest.fixture
def recipe_text(tmp_path: Path) -> RecipeText:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama", {"keep": 0.6}),
        ("llama", {"width": 22, "neurons": 40}),
        ("qwen2-tied", {"keep": 0.7}),
        ("qwen2-tied", {"width": 24, "untie": True}),
        ("opt", {"slicing": 0.25, "neurons": 13}),
        ("phi", {"keep": 0.5, "form": "custom"}),
    ],
    ids=str,
)
def test_the_manifest_is_a_recipe(case: str, options: dict, run_slice: Slicer) -> None:
    first = run_slice(case, **options)
    form = {"form": options["form"]} if "form" in options else {}
    second = run_slice(case, recipe=first.output / "eigenslice.json", **form)
    for field in ("plan", "site_widths", "tied", "form", "model_type", "parameters", "refitted"):
        assert second.manifest[field] == first.manifest[field]
    tensors, again = (load_file(result.output / "model.safetensors") for result in (first, second))
    assert tensors.keys() == again.keys()
    assert all(tensors[name].equal(again[name]) for name in tensors)


def test_a_per_block_manifest_is_a_recipe(run_slice: Slicer) -> None:
    first = run_slice("llama", width=24, basis="per-block")
    second = run_slice("llama", recipe=first.output / "eigenslice.json", basis="per-block")
    assert second.manifest["site_widths"] == first.manifest["site_widths"] == [24] * 6 + [32]


def test_numbers_for_blocks_go_through_a_manifest(run_slice: Slicer, recipe_text: RecipeText) -> None:
    first = run_slice("llama", recipe=recipe_text("width: 24\nneurons: [40, 8, 56]"))
    second = run_slice("llama", recipe=first.output / "eigenslice.json")
    assert second.manifest["plan"]["neurons"] == [40, 8, 56]
    assert second.manifest["parameters"] == first.manifest["parameters"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width: 24", {"width": 24, "neurons": 56, "tied": True}),
        ("width: 24\nneurons: 40", {"width": 24, "neurons": 40, "tied": True}),
        ("width: 24\nneurons: [40, 40, 40]", {"width": 24, "neurons": 40, "tied": True}),
        ("width: 24\nneurons:\n- 9\n- 10\n- 11\n", {"width": 24, "neurons": [9, 10, 11], "tied": True}),
        ("width: 24\ntied: false", {"width": 24, "neurons": 56, "tied": False}),
        ("width: 32", {"width": 32, "neurons": 56, "tied": True}),
        ('{"width": 24, "neurons": 8, "basis": "global"}', {"width": 24, "neurons": 8, "tied": True}),
        ('{"plan": {"width": 16}, "eigenslice": "9.9", "spectra": []}', {"width": 16, "neurons": 56, "tied": True}),
    ],
)
def test_recipes_by_hand(text: str, expected: dict, run_slice: Slicer, recipe_text: RecipeText) -> None:
    result = run_slice("llama-tied", recipe=recipe_text(text))
    assert result.manifest["plan"] == expected | {"basis": "global"}
    assert load(result.output).num_parameters() == result.manifest["parameters"]["stored"]


def test_one_number_for_all_blocks_is_stock(run_slice: Slicer, recipe_text: RecipeText) -> None:
    assert run_slice("llama", recipe=recipe_text("width: 24\nneurons: [40, 40, 40]")).manifest["form"] == "stock"
    assert run_slice("llama", recipe=recipe_text("width: 24\nneurons: [40, 40, 48]")).manifest["form"] == "custom"


WRONG = [
    ("", "can't be read"),
    ("- 1\n- 2", "can't be read"),
    ("24", "can't be read"),
    ("width: [", "can't be read"),
    ("\x00", "can't be read"),
    ("!!python/object/apply:os.getcwd []", "can't be read"),
    ("plan: 5", "can't be read"),
    ("plan:", "can't be read"),
    ("neurons: 40", "wrong width (missing)"),
    ("plan: {neurons: 40}", "wrong width (missing)"),
    ("24: 3", "wrong 24"),
    ("width: 24\ndepth: 3", "wrong depth"),
    ("width: wide", "wrong width"),
    ("width: 24.0", "wrong width"),
    ("width: true", "wrong width"),
    ("width:", "wrong width"),
    ("width: 24\ntied: maybe", "wrong tied"),
    ("width: 24\nneurons: many", "wrong neurons"),
    ("width: 24\nneurons: true", "wrong neurons"),
    ("width: 24\nneurons:", "wrong neurons"),
    ("width: 24\nneurons: 40.5", "wrong neurons"),
    ("width: 24\nneurons: []", "the result has 3 blocks"),
    ("width: 24\nneurons: [40, 40]", "the result has 3 blocks"),
    ("width: 24\nneurons: [40, 40, 40, 40]", "the result has 3 blocks"),
    ("width: 24\nneurons: [40, 40, x]", "wrong neurons"),
    ("width: 24\nneurons: [40, true, 40]", "wrong neurons"),
    ("width: 24\nbasis: local", "wrong basis local"),
    ("width: 24\nbasis: per-block", "wrong basis per-block (the run has --basis global)"),
    ("width: 0", "the recipe's width is 0; the model's hidden width is 32"),
    ("width: 33", "the recipe's width is 33; the model's hidden width is 32"),
    ("width: 24\ntied: true", "the recipe keeps embedding and head tied"),
    ("width: 24\nneurons: 0", "keeps 0 neurons; the model has 56 MLP neurons in each block"),
    ("width: 24\nneurons: [40, 57, 40]", "keeps 57 neurons; the model has 56"),
    ("width: 24\nneurons: [40, -1, 40]", "keeps -1 neurons"),
]


@pytest.mark.parametrize(("text", "found"), WRONG, ids=[repr(text) for text, _ in WRONG])
def test_wrong_recipes_are_refused(text: str, found: str, plans: Planner, recipe_text: RecipeText) -> None:
    with pytest.raises(OptionsError) as caught:
        plans("llama", recipe=recipe_text(text))
    check_message(caught.value, found)


def test_recipes_that_are_no_text_are_refused(plans: Planner, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"width: \xff\xfe")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(OptionsError) as caught:
            plans("llama", recipe=path)
        check_message(caught.value, str(path), "can't be read")


@pytest.mark.parametrize("case", ["llama", "phi"])
def test_a_recipe_of_another_model_is_refused(case: str, run_slice: Slicer, tmp_path: Path) -> None:
    """With more blocks, a wider stream."""
    config = tiny.LLAMA | {"hidden_size": 64, "num_hidden_layers": 4}
    other = tiny.save(tiny.tiny_model("llama", config), tmp_path / "other")
    with warnings.catch_warnings(action="ignore"):
        made = run_slice("llama", model=str(other), width=40)
    with pytest.raises(OptionsError) as caught:
        run_slice(case, recipe=made.output / "eigenslice.json")
    check_message(caught.value, "width is 40; the model's hidden width is 32")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"width": 24, "neurons": 0}, "--neurons 0; the model has 56"),
        ({"width": 24, "neurons": 57}, "--neurons 57; the model has 56"),
        ({"width": 24, "neurons": -3}, "--neurons -3; the model has 56"),
        ({"width": 24, "neurons": 40, "basis": "per-block"}, "--neurons 40 with --basis per-block"),
        ({"keep": 0.8, "neurons": 40}, "--neurons 40 with"),
        ({"width": 24, "neurons": 40, "mlp": False}, "--neurons 40 with"),
        ({"width": 24, "refit": True, "basis": "per-block"}, "--refit with --basis per-block"),
        ({"width": 24, "recipe": Path("r.yaml")}, "--width and --recipe together"),
        ({"recipe": Path("r.yaml"), "neurons": 40}, "--neurons 40 with"),
    ],
    ids=str,
)
def test_options_that_contradict_are_refused(options: dict, found: str, plans: Planner) -> None:
    with pytest.raises(OptionsError) as caught:
        plans("llama", **options)
    check_message(caught.value, found)


def test_neurons_in_a_per_block_recipe_are_refused(plans: Planner, recipe_text: RecipeText) -> None:
    with pytest.raises(OptionsError) as caught:
        plans("llama", recipe=recipe_text("width: 24\nneurons: 40\nbasis: per-block"), basis="per-block")
    check_message(caught.value, "40 neurons with --basis per-block")


def test_refit_is_the_default_with_one_basis() -> None:
    for basis, refit, fits in [
        ("global", None, True),
        ("global", True, True),
        ("global", False, False),
        ("per-block", None, False),
        ("per-block", False, False),
    ]:
        options = SliceOptions(model="m", output=Path("out"), width=8, basis=basis, refit=refit)  # pyright: ignore[reportArgumentType]
        assert options.fits == fits
        assert json.loads(options.model_dump_json())["refit"] == refit


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_chosen_widths_and_neurons_are_multiples(multiple: int, plans: Planner) -> None:
    for options in ({"keep": 0.7}, {"slicing": 0.3}):
        _, found = plans("llama", multiple=multiple, **options)
        for width, neurons in map(size, found):
            assert width % multiple == 0
            assert neurons % multiple == 0 or neurons == 56
    (plan,) = plans("llama", multiple=multiple, slicing=0.3)[1]
    assert size(plan)[0] == {1: 22, 4: 20, 16: 16}[multiple]


def test_a_multiple_wider_than_the_model_is_refused(plans: Planner) -> None:
    with pytest.raises(OptionsError, match="leaves width 0"):
        plans("llama", slicing=0.3, multiple=64)


@pytest.mark.parametrize("multiple", [1, 3])
def test_portable_widths_divide_by_the_heads(multiple: int, plans: Planner) -> None:
    """Qwen2 is saved as Llama there, and as Qwen2, which other runtimes don't run, elsewhere."""
    for keep in (0.9, 0.7, 0.5):
        _, found = plans("qwen2", keep=keep, portable=True, multiple=multiple)
        assert found
        for plan in found:
            assert plan.stock is not None
            assert (plan.stock.model_type, plan.stock.portable) == ("llama", True)
            assert size(plan)[0] % (4 * multiple) == 0 or size(plan)[0] == tiny.WIDTH


@pytest.mark.parametrize(
    ("case", "options", "found"),
    [
        ("qwen2", {"width": 22}, "at width 22 this qwen2 model would be saved as qwen2"),
        ("llama-biased", {"width": 22}, "saved in eigenslice's class"),
        ("opt", {"width": 24}, "saved in eigenslice's class"),
        ("granite", {"width": 24}, "saved as granite"),
    ],
)
def test_what_is_not_portable_is_refused(case: str, options: dict, found: str, plans: Planner) -> None:
    with pytest.raises(OptionsError) as caught:
        plans(case, portable=True, **options)
    check_message(caught.value, found)
    assert "llama, mistral" in caught.value.allowed


@pytest.mark.parametrize("options", [{"form": "custom"}, {"basis": "per-block"}])
def test_portable_results_are_stock(options: dict) -> None:
    with pytest.raises(OptionsError, match="--portable with"):
        SliceOptions(model="m", output=Path("out"), width=8, portable=True, **options)


@pytest.mark.parametrize("multiple", [0, -8, 5000])
def test_multiples_have_a_range(multiple: int) -> None:
    with pytest.raises(OptionsError, match=f"--multiple {multiple}"):
        SliceOptions(model="m", output=Path("out"), width=8, multiple=multiple)


def test_plans_need_a_config_only() -> None:
    """For a wide Llama without weights: sizes by hand, and by the models that results load as."""
    width, neurons, vocabulary, layers = 4096, 11008, 32000, 2
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers, vocab_size=vocabulary
    )
    whole = 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * neurons + 2 * width) + width
    anatomy = Anatomy.of_config(config)
    assert anatomy.parameters == whole
    options = SliceOptions(model="m", output=Path("out"), keep=0.75, heads=False, depth=False)
    (family,) = make_plans(anatomy, options)
    assert {plan.site_widths[0] for plan in family} > {width}
    for plan in family:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(checked_config(stock_config(anatomy, plan, torch.float32)))
        assert 0.74 * whole < model.num_parameters() <= 0.75 * whole
        assert model.num_parameters() == stored_parameters(anatomy, plan)


@pytest.mark.parametrize(("keep", "numbers"), [(0.9, [0]), (0.5, [0, 1]), (0.25, [0, 1])])
@pytest.mark.parametrize("case", ["llama", "opt", "gpt_neox"])
def test_blocks_bear_a_part_of_the_cut(case: str, keep: float, numbers: list[int], dense_folder: Folders) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    options = SliceOptions(model=case, output=Path("out"), keep=keep, heads=False)
    families = make_plans(dense.anatomy, options)
    assert [len(family[0].dropped_blocks) for family in families] == numbers
    for plan in (plan for family in families for plan in family):
        assert (
            len(plan.kept_blocks) == len(plan.neurons_per_block) == dense.anatomy.block_count - len(plan.dropped_blocks)
        )
        assert stored_parameters(dense.anatomy, plan) <= keep * dense.anatomy.parameters
