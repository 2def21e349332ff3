"""The anatomy of a model from its config alone, against the model that transformers builds."""

import copy
from functools import cached_property
from typing import Any

import pytest
from transformers import AutoConfig

from eigenslice.arch import TABLES
from eigenslice.arch.heads import HeadCounts
from eigenslice.checkpoint.source import open_source
from eigenslice.errors import UnsupportedModelError
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from tests import tiny
from tests.conftest import Folders

FACTS = [name for name in vars(Anatomy) if isinstance(vars(Anatomy)[name], property | cached_property)]
FACTS += ["shapes", "tied", "fixed_positions", "in_float32"]


def anatomy_of(case: str, **values: Any) -> Anatomy:
    chosen = tiny.CASES[case]
    return Anatomy.of_config(
        AutoConfig.for_model(chosen.model_type, **copy.deepcopy(chosen.config | chosen.extra | values))
    )


def numbers(module: Any) -> int:
    """Number of stored numbers of a module; a tensor that is there twice counts once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}.values())


@pytest.mark.parametrize("case", tiny.CASES)
def test_sizes_are_those_of_the_model(case: str) -> None:
    anatomy, model = anatomy_of(case), tiny.CASES[case].build()
    layers = model.get_submodule(anatomy.table.layers)
    assert anatomy.width == model.get_input_embeddings().embedding_dim == tiny.WIDTH
    assert anatomy.block_count == len(layers) == 3
    assert anatomy.parameters == numbers(model)
    assert anatomy.block_sizes == tuple(map(numbers, layers))
    assert anatomy.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert anatomy.names_in_block(1).keys() == layers[1].state_dict().keys()
    assert anatomy.reader_bias == ("bias" in model.get_submodule(anatomy.table.final_norm).state_dict())


@pytest.mark.parametrize("case", ["llama", "llama-tied", "opt", "xglm", "mixtral", "deepseek_v2", "gpt_oss", "bloom"])
def test_a_checkpoint_has_the_anatomy_of_its_config(case: str, dense_folder: Folders) -> None:
    dense = DenseModel(open_source(str(dense_folder(case)))).anatomy
    alone = anatomy_of(case)
    assert len(FACTS) > 20
    for fact in FACTS:
        assert getattr(dense, fact) == getattr(alone, fact), fact


@pytest.mark.parametrize(
    ("case", "values", "expected"),
    [
        ("llama", {"intermediate_size": 40}, {"neuron_count": 40, "kv_head_count": 2, "expert_count": 0}),
        ("opt", {"ffn_dim": 48}, {"neuron_count": 48, "kv_head_count": 4, "neuron_rows": 48}),
        ("phi3", {}, {"neuron_count": 56, "neuron_rows": 112, "head_counts": HeadCounts(2, 2)}),
        ("qwen3_moe", {}, {"neuron_count": 24, "expert_count": 4, "neuron_rows": 0}),
        ("deepseek_v2", {}, {"neuron_count": 24, "expert_count": 4, "shared_neuron_count": 48}),
        ("gpt_oss", {}, {"in_float32": frozenset()}),
        ("olmo2", {}, {"head_counts": None, "kv_head_count": 0}),
        ("falcon", {}, {"head_counts": HeadCounts(1, 4)}),
        ("falcon-new", {}, {"head_counts": HeadCounts(2, 2)}),
        ("gpt_bigcode", {}, {"head_counts": HeadCounts(1, 4)}),
        ("persimmon", {}, {"head_counts": HeadCounts(4, 1)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_units_are_counted_by_the_config(case: str, values: dict[str, Any], expected: dict[str, Any]) -> None:
    anatomy = anatomy_of(case, **values)
    assert {fact: getattr(anatomy, fact) for fact in expected} == expected


@pytest.mark.parametrize(
    ("case", "values", "kinds"),
    [
        ("llama", {}, "aaa"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "aba"),
        ("gemma2", {}, "aba"),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, "aab"),
        ("deepseek_v3", {}, "abb"),
        ("qwen3_moe", {}, "aba"),
        ("qwen3_5_text", {}, "aba"),
        ("gpt_neo", {}, "aba"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "abc"),
    ],
)
def test_blocks_of_one_kind_are_those_that_transformers_builds_alike(
    case: str, values: dict[str, Any], kinds: str
) -> None:
    anatomy = anatomy_of(case, **values)
    assert [anatomy.kinds.index(kind) for kind in anatomy.kinds] == [kinds.index(kind) for kind in kinds]
    assert anatomy.blocks_alike == (len(set(kinds)) == 1)


def test_tied_embeddings_behind_a_norm_of_their_own_cannot_stay_tied() -> None:
    assert anatomy_of("opt").can_stay_tied
    bloom = anatomy_of("bloom")
    assert bloom.tied
    assert not bloom.can_stay_tied


def test_biases_hold_folded_shifts_in_the_custom_class_only() -> None:
    biased, plain = anatomy_of("opt"), anatomy_of("llama")
    assert biased.keeps_bias("lm_head.bias", stock=False)
    assert not biased.keeps_bias("lm_head.bias", stock=True)
    assert not plain.keeps_bias("lm_head.bias", stock=False)
    assert anatomy_of("llama-biased").keeps_bias("model.layers.0.self_attn.q_proj.bias", stock=True)


def test_a_config_without_a_table_is_refused() -> None:
    assert "mamba" not in TABLES
    with pytest.raises(UnsupportedModelError):
        Anatomy.of_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=96))
