"""The config of a result: the custom class's, or that of a stock form."""

import copy
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from eigenslice.arch.heads import HeadCounts
from eigenslice.model.anatomy import Anatomy
from eigenslice.modeling import AUTO_MAP, SlicedConfig
from eigenslice.plan.kept_blocks import dense_config
from eigenslice.plan.plan import Plan, full_plan

LEGACY_ROPES = frozenset(("default", "linear", "dynamic", "yarn", "longrope", "llama3"))
"""Kinds of rotary angles in transformers 4.57."""


def custom_config(anatomy: Anatomy, plan: Plan, dtype: torch.dtype) -> SlicedConfig:
    """Config of the custom class."""
    values: dict[str, Any] = {"architectures": ["SlicedForCausalLM"], "auto_map": AUTO_MAP}
    text, resized = _with_heads(anatomy, plan)
    return SlicedConfig(
        text_config=text | _expert_fields(anatomy, plan) | {"tie_word_embeddings": plan.tied},
        architecture=architecture(anatomy),
        site_widths=list(plan.site_widths),
        neurons=list(plan.neurons_per_block)
        if resized or set(plan.neurons_per_block) != {anatomy.neuron_count}
        else None,
        dense_width=anatomy.width if resized else None,
        shortcuts=plan.shortcuts,
        rotated=plan.rotated,
        norm_eps=anatomy.eps,
        reader_bias=anatomy.reader_bias,
        head_bias=anatomy.keeps_bias(anatomy.table.lm_head + ".bias", stock=False),
        centered_embedding=plan.tied and anatomy.layer_norm,
        tie_word_embeddings=plan.tied,
        dtype=dtype,
        **values,
    )


def canonical_config(anatomy: Anatomy) -> SlicedConfig:
    """Config under which the custom class is the dense model in canonical form."""
    return custom_config(anatomy, full_plan(anatomy, tied=False), torch.float32)


def stock_config(anatomy: Anatomy, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a stock result.

    Raises:
        ValueError: the config class refuses this width.
    """
    form = plan.stock
    assert form is not None
    values, heads = dense_config(anatomy, plan.kept_blocks), plan.heads(anatomy)
    if not (anatomy.table.heads_span_width or values.get("head_dim")):
        values["head_dim"] = head_dim(anatomy.config)
    values |= {} if heads is None else _head_fields(anatomy, heads)
    values |= _expert_fields(anatomy, plan)
    if form.model_type != anatomy.table.model_type:
        fields = AutoConfig.for_model(form.model_type).to_dict()
        values = {key: value for key, value in values.items() if key in fields}
    values |= {
        **form.overrides,
        "model_type": form.model_type,
        "hidden_size": plan.site_widths[0],
        "tie_word_embeddings": plan.tied,
    }
    if anatomy.table.mlp.can_cut_neurons and anatomy.table.neurons_field:
        values[anatomy.table.neurons_field] = plan.neurons_per_block[0]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(checked_config(values))]
    name = str(dtype).removeprefix("torch.")
    return values | _legacy_rope(values) | {"architectures": [model_class.__name__], "dtype": name, "torch_dtype": name}


def checked_config(values: dict[str, Any]) -> Any:
    """The config object of some values. Raises ValueError where its class refuses them."""
    try:
        config = AutoConfig.for_model(**values)
        config.validate()
    except Exception as error:  # each config class refuses in its own way
        raise ValueError(str(error)) from error
    return config


def architecture(anatomy: Anatomy) -> dict[str, Any]:
    """Return the fields of a table that the custom class needs."""
    table = anatomy.table
    sublayer = {
        name: {
            "norm": s.norm,
            "modules": list(s.modules),
            "readers": list(s.readers),
            "writers": list(s.writers),
            "normed_writers": list(s.normed_writers),
            "post_norm": s.post_norm,
            "gated": list(s.gated),
            "transposed": list(s.transposed),
            "stacked": list(s.stacked),
            "shared": list(s.shared),
            "renames": {module: dict(names) for module, names in s.renames.items()},
            "adds_stream": s.adds_stream,
        }
        for name, s in (("attention", table.attention), ("mlp", table.mlp))
    }
    return sublayer | {
        "embeddings": list(table.embeddings),
        "layers": table.layers,
        "final_norm": table.final_norm,
        "head": table.lm_head,
        "parallel": table.is_parallel(anatomy.config),
        "dropout": table.dropout,
        "sinusoids": table.sinusoids,
        "embedding_norm": table.embedding_norm,
        "layers_give_tuples": table.layers_give_tuples,
        "stream_scale": table.stream_scale,
    }


def _with_heads(anatomy: Anatomy, plan: Plan) -> tuple[dict[str, Any], bool]:
    """Return the dense config with a plan's numbers of blocks and heads, and whether its hidden size is another one.

    The custom class gives all weights their width, so that only attention's own modules need this hidden size.
    """
    values, heads = dense_config(anatomy, plan.kept_blocks), plan.heads(anatomy)
    if heads is None:
        return values, False
    values |= _head_fields(anatomy, heads)
    if not anatomy.table.heads_span_width:
        values["head_dim"] = values.get("head_dim") or head_dim(anatomy.config)
        try:
            checked_config(copy.deepcopy(values))
        except ValueError:  # the hidden size isn't a multiple of the number of heads
            pass
        else:
            return values, False
    width = head_dim(anatomy.config) * heads.queries
    return values | dict.fromkeys((_field(anatomy, "hidden_size"), *anatomy.table.width_fields), width), True


def _head_fields(anatomy: Anatomy, heads: HeadCounts) -> dict[str, int]:
    """Return the fields of a dense config with other numbers of heads."""
    kv = anatomy.table.kv_heads_field
    return {_field(anatomy, "num_attention_heads"): heads.queries} | ({kv: heads.kv} if kv else {})


def _expert_fields(anatomy: Anatomy, plan: Plan) -> dict[str, int]:
    """Return the field of a dense config with the number of experts, if some are cut."""
    name = anatomy.table.experts_field
    return {} if plan.experts is None or name is None else {_field(anatomy, name): plan.experts}


def head_dim(config: Any) -> int:
    """Return the width of a head where the config doesn't say it."""
    return config.hidden_size // config.num_attention_heads


def _field(anatomy: Anatomy, name: str) -> str:
    """Return the name that a dense config has for one of transformers' common fields."""
    return type(anatomy.config).attribute_map.get(name, name)


def _legacy_rope(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters as transformers 4 spells them (it ignores `rope_parameters` and takes 10000).

    Where each kind of attention has its own, `rope_theta` and `rope_scaling` are of full attention. The base of sliding
    attention is another field for Gemma 3, and the same field for OLMo 3.
    """
    rope = values.get("rope_parameters")
    if not rope:
        return {}
    if "full_attention" in rope:
        legacy = _legacy_rope({"rope_parameters": rope["full_attention"]})
        return legacy and legacy | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    if rope.get("rope_type", "default") not in LEGACY_ROPES:
        return {}
    legacy: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        legacy["rope_scaling"] = {k: v for k, v in rope.items() if k not in legacy}
    return legacy
