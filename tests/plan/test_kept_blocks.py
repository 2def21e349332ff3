"""Leaving out blocks of models whose blocks are of several kinds: the other blocks stay what they are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from eigenslice.checkpoint.source import open_source
from eigenslice.errors import OptionsError
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.candidates import make_plans, without_blocks
from eigenslice.plan.dropped_blocks import blocks_to_drop, why_blocks_stay
from eigenslice.plan.kept_blocks import dense_config
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import Plan
from eigenslice.plan.result_config import checked_config, stock_config
from tests import tiny
from tests.conftest import Recipe, Slicer
from tests.messages import check_message
from tests.reference import layers_of, without_block
from tests.results import load, relative, stored_tensors

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOW = {"sliding_window": 6}
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2-window", {"max_window_layers": 2}),
    "qwen3": ("qwen3", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "cwm": ("cwm", {"layer_types": [FULL, SLIDING, SLIDING, FULL]}),
    "ministral": ("ministral", {"layer_types": [SLIDING, FULL, SLIDING, FULL]}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}),
    "smollm3-window": (
        "smollm3",
        WINDOW | {"no_rope_layers": None, "no_rope_layer_interval": 2, "use_sliding_window": True},
    ),
    "cohere2": ("cohere2", {"layer_types": [SLIDING, FULL, SLIDING, SLIDING]}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": 6}),
    "gpt_oss": ("gpt_oss", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {"layer_types": [SLIDING, FULL, SLIDING, FULL]}),
    "olmo3": ("olmo3", {"layer_types": [SLIDING, SLIDING, FULL, SLIDING]}),
    "exaone4": ("exaone4", {}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 2}),
    "glm4_moe": ("glm4_moe", {"first_k_dense_replace": 2}),
    "deepseek_v2": ("deepseek_v2", {"first_k_dense_replace": 2}),
    "deepseek_v3": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "llama4_text": ("llama4_text", {"no_rope_layer_interval": 2, "attention_chunk_size": 7}),
    "qwen3_next": ("qwen3_next", {"layer_types": [LINEAR, FULL, LINEAR, FULL], "mlp_only_layers": [2]}),
    "qwen3_5_text": ("qwen3_5_text", {"layer_types": [LINEAR, FULL, LINEAR, FULL]}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {"layer_types": [LINEAR, LINEAR, FULL, LINEAR]}),
    "gemma4_text": ("gemma4_text-tied", {"layer_types": [SLIDING, FULL, SLIDING, FULL]}),
}
"""A case of `tiny`, and values that give it four blocks of several kinds."""

STAY = {("gemma4_text", 3), ("qwen3_5_moe_text", 2)}
"""Blocks that must stay: Gemma 4's last block has full attention, and recurrent models need a block with attention."""


def config_of(name: str) -> dict[str, Any]:
    """Return the values of a model's config."""
    case, values = MIXED[name]
    chosen = tiny.CASES[case]
    return copy.deepcopy(chosen.config | chosen.extra | {"num_hidden_layers": 4} | values)


def anatomy_of(name: str) -> Anatomy:
    return Anatomy.of_config(AutoConfig.for_model(tiny.CASES[MIXED[name][0]].model_type, **config_of(name)))


@pytest.fixture
def folder_of(tmp_path: Path) -> Any:
    """Gives the folder of a model."""

    def get(name: str) -> Path:
        model = tiny.tiny_model(tiny.CASES[MIXED[name][0]].model_type, config_of(name))
        return tiny.save(model, tmp_path / name)

    return get


@pytest.mark.parametrize("form", ["auto", "custom"])
@pytest.mark.parametrize("name", MIXED)
def test_each_block_can_go_from_models_of_several_kinds(
    name: str, form: str, folder_of: Any, run_slice: Slicer, recipe: Recipe, none_held_out: CalibrationOptions
) -> None:
    options: dict[str, Any] = {"form": form, "refit": False, "calibration": none_held_out}
    folder, ids, case = folder_of(name), tiny.random_ids(2, 20, seed=5), MIXED[name][0]
    dense = DenseModel(open_source(str(folder)))
    assert len(set(dense.anatomy.kinds)) > 1
    checked = 0
    for block in range(1, 4):
        model = load(folder)
        if why_blocks_stay(dense.anatomy, [block]):
            assert (name, block) in STAY
            continue
        result = run_slice(case, model=str(folder), recipe=recipe(dropped_blocks=[block]), **options)
        assert result.manifest["plan"]["dropped_blocks"] == [block]
        sliced = load(result.output)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            size = sum(tensor.numel() for tensor in layers_of(model)[block].state_dict().values())
            expected = without_block(model, block)(ids, use_cache=False).logits
            assert relative(sliced(ids, use_cache=False).logits, expected) < 1e-4
            assert relative(whole, expected) > 1e-3
            first = sliced(ids[:, :12], use_cache=True)
            rest = [sliced(ids[:, n : n + 1], past_key_values=first.past_key_values).logits for n in range(12, 20)]
            assert relative(torch.cat([first.logits, *rest], dim=1), expected) < 1e-4
        generated = [
            sliced.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)
        ]
        assert torch.equal(*generated)
        stored = sum(torch.Size(shape).numel() for shape in stored_tensors(result.output).values())
        assert stored == result.manifest["parameters"]["stored"]
        if result.manifest["form"] == "stock" and not model.config.tie_word_embeddings:
            assert stored == dense.anatomy.parameters - size
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", MIXED)
def test_several_blocks_can_go(
    name: str, folder_of: Any, run_slice: Slicer, recipe: Recipe, none_held_out: CalibrationOptions
) -> None:
    options: dict[str, Any] = {"refit": False, "calibration": none_held_out}
    folder, ids = folder_of(name), tiny.random_ids(2, 20, seed=5)
    pair = [1, 3] if (name, 2) in STAY else [1, 2]
    result = run_slice(MIXED[name][0], model=str(folder), recipe=recipe(dropped_blocks=pair), **options)
    model = load(folder)
    for block in pair:
        without_block(model, block)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert relative(load(result.output)(ids, use_cache=False).logits, expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "kept", "expected"),
    [
        ("qwen2", [0, 2, 3], {"layer_types": [FULL, SLIDING, SLIDING], "max_window_layers": 1}),
        ("deepseek_v3", [0, 3], {"first_k_dense_replace": 1}),
        ("deepseek_v3", [0, 1, 2], {"first_k_dense_replace": 3}),
        ("qwen3_moe", [0, 1, 3], {"mlp_only_layers": [0, 1], "decoder_sparse_step": 1}),
        ("llama4_text", [0, 2, 3], {"no_rope_layers": [1, 1, 0], "moe_layers": [2], "interleave_moe_layer_step": 3}),
        ("llama4_text", [0, 1, 3], {"no_rope_layers": [1, 0, 0], "moe_layers": [1, 2], "interleave_moe_layer_step": 2}),
        ("gpt_neo", [0, 2, 3], {"attention_types": [[["global", "global", "local"], 1]], "num_layers": 3}),
    ],
)
def test_fields_are_those_of_the_kept_blocks(name: str, kept: list[int], expected: dict[str, Any]) -> None:
    values = dense_config(anatomy_of(name), kept)
    assert {field: values[field] for field in expected} == expected


def test_values_of_single_blocks_move_with_them() -> None:
    anatomy = anatomy_of("gemma4_text")
    whole, fewer = (dense_config(anatomy, kept)["per_layer_config"] for kept in ([0, 1, 2, 3], [0, 2, 3]))
    assert set(whole) == {"1", "3"}
    assert fewer == {"2": whole["3"]}


def test_lists_of_unknown_meaning_keep_all_blocks() -> None:
    anatomy = anatomy_of("gemma2")
    anatomy.config.layer_groups = [1, 2, 1, 2]
    assert "layer_groups" in (why_blocks_stay(anatomy, [1]) or "")
    anatomy.config.layer_groups = [1, 1, 1, 1]
    assert why_blocks_stay(anatomy, [1]) is None
    assert dense_config(anatomy, [0, 2])["layer_groups"] == [1, 1]
    anatomy.config.eos_token_id = [2, 5, 6, 7]
    assert dense_config(anatomy, [0, 2])["eos_token_id"] == [2, 5, 6, 7]


def test_the_last_block_stays_where_the_config_wants_it(folder_of: Any, run_slice: Slicer, recipe: Recipe) -> None:
    anatomy = anatomy_of("gemma4_text")
    assert why_blocks_stay(anatomy, [3])
    assert why_blocks_stay(anatomy, [2, 3]) is None
    assert blocks_to_drop(anatomy, [3, 2, 1], 1) == (2,)
    assert blocks_to_drop(anatomy, [3, 2, 1], 2) == (2, 3)
    with pytest.raises(OptionsError, match="leaves out the blocks") as error:
        run_slice("gemma4_text", model=str(folder_of("gemma4_text")), recipe=recipe(dropped_blocks=[3]), refit=False)
    check_message(error.value)


def test_a_form_that_would_change_other_blocks_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of this type says nothing of its kinds, so that the check by the built model must find it out."""
    anatomy = anatomy_of("qwen3_moe")
    monkeypatch.setattr("eigenslice.plan.kept_blocks.NUMBERS_OF_BLOCKS", ())
    monkeypatch.setattr("eigenslice.plan.kept_blocks._experts", lambda values, kept: {})
    assert "block 3" in (why_blocks_stay(anatomy, [1]) or "")


@pytest.mark.parametrize("name", ["deepseek_v2", "llama4_text", "gemma2"])
def test_no_plan_is_over_the_size_whichever_blocks_go(name: str) -> None:
    anatomy = anatomy_of(name)
    options = SliceOptions(model=name, output=Path("out"), keep=0.5, heads=False)
    families = [family for family in make_plans(anatomy, options) if family[0].dropped_blocks]
    assert families
    sizes = set()
    for order in ([1, 2, 3], [3, 2, 1], [2, 1, 3]):
        for family in families:
            for plan in without_blocks(anatomy, options, family, order):
                assert plan.dropped_blocks == tuple(sorted(order[: len(plan.dropped_blocks)]))
                assert len(plan.dropped_blocks) == len(family[0].dropped_blocks)
                assert stored_parameters(anatomy, plan) <= 0.5 * anatomy.parameters
                if plan.stock:
                    built = Anatomy.of_config(checked_config(stock_config(anatomy, plan, torch.float32)))
                    assert built.parameters == stored_parameters(anatomy, plan)
                sizes.add((plan.dropped_blocks, plan.site_widths[0], plan.neurons_per_block[0]))
    assert len({dropped for dropped, *_ in sizes}) > 1
    assert len(set(anatomy.block_sizes)) == 1 or len({tuple(kept) for _, *kept in sizes}) > 1


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "gemma3_text", "qwen3_5_text"])
@pytest.mark.parametrize("order", [[1, 2, 3], [3, 2, 1]])
def test_keep_holds_whichever_block_is_missed_least(
    name: str, order: list[int], folder_of: Any, run_slice: Slicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, folder = 0.6, folder_of(name)

    def order_of(*args: Any) -> dict[int, float]:
        return dict.fromkeys(order, 1.0)

    def most_dropped(run: Any, plans: list[Plan], *args: Any, **kwargs: Any) -> list[float]:
        return [1.0 / (1 + len(plan.dropped_blocks)) for plan in plans]

    monkeypatch.setattr("eigenslice.search.choose.missed_least", order_of)
    monkeypatch.setattr("eigenslice.search.choose.try_plans", most_dropped)
    result = run_slice(MIXED[name][0], model=str(folder), keep=keep, heads=False)
    assert result.manifest["plan"]["dropped_blocks"] == order[:1]
    sizes, whole = result.manifest["parameters"], sum(map(torch.Size.numel, map(torch.Size, _shapes(folder))))
    stored = sum(map(torch.Size.numel, map(torch.Size, _shapes(result.output))))
    assert sizes["stored"] == stored <= keep * sizes["dense"]
    assert sizes["dense"] == whole
    assert load(result.output)(tiny.random_ids(1, 9)).logits.isfinite().all()


def _shapes(folder: Path) -> Any:
    return stored_tensors(folder).values()
