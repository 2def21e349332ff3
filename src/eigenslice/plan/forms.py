"""The forms a result can be saved in: a stock config of transformers where one fits, else the custom class."""

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from eigenslice.arch import StockForm
from eigenslice.arch.heads import HeadCounts
from eigenslice.checkpoint.empty import empty_model
from eigenslice.errors import OptionsError, first_line
from eigenslice.model.anatomy import Anatomy, parameter_shapes
from eigenslice.model.block_kinds import block_kinds
from eigenslice.modeling import AUTO_MAP, SlicedConfig
from eigenslice.plan.kept_blocks import dense_config
from eigenslice.plan.layout import layout
from eigenslice.plan.plan import BasisKind, Plan, Sizes, full_plan, widths

FormChoice = Literal["auto", "stock", "custom"]

LEGACY_ROPES = frozenset(("default", "linear", "dynamic", "yarn", "longrope", "llama3"))
"""Kinds of rotary angles in transformers 4.57."""


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


def _expert_fields(anatomy: Anatomy, plan: Plan) -> dict[str, int]:
    """Return the field of a dense config with the number of experts, if some are cut."""
    name = anatomy.table.experts_field
    return {} if plan.experts is None or name is None else {_field(anatomy, name): plan.experts}


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


def _with_heads(anatomy: Anatomy, plan: Plan) -> tuple[dict[str, Any], bool]:
    """Return the dense config with a plan's numbers of blocks and heads, and whether its hidden size is another one.

    The custom class gives all weights their width, so that only attention's own modules need this hidden size.
    """
    values, heads = dense_config(anatomy, plan.kept_blocks), plan.heads(anatomy)
    if heads is None:
        return values, False
    values |= _head_fields(anatomy, heads)
    if not anatomy.table.heads_span_width:
        values["head_dim"] = values.get("head_dim") or _head_dim(anatomy.config)
        try:
            checked_config(copy.deepcopy(values))
        except ValueError:  # the hidden size isn't a multiple of the number of heads
            pass
        else:
            return values, False
    width = _head_dim(anatomy.config) * heads.queries
    return values | dict.fromkeys((_field(anatomy, "hidden_size"), *anatomy.table.width_fields), width), True


def canonical_config(anatomy: Anatomy) -> SlicedConfig:
    """Config under which the custom class is the dense model in canonical form."""
    return custom_config(anatomy, full_plan(anatomy, tied=False), torch.float32)


def _field(anatomy: Anatomy, name: str) -> str:
    """Return the name that a dense config has for one of transformers' common fields."""
    return type(anatomy.config).attribute_map.get(name, name)


def _head_fields(anatomy: Anatomy, heads: HeadCounts) -> dict[str, int]:
    """Return the fields of a dense config with other numbers of heads."""
    kv = anatomy.table.kv_heads_field
    return {_field(anatomy, "num_attention_heads"): heads.queries} | ({kv: heads.kv} if kv else {})


def _head_dim(config: Any) -> int:
    """Return the width of a head where the config doesn't say it."""
    return config.hidden_size // config.num_attention_heads


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


def stock_config(anatomy: Anatomy, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a stock result.

    Raises:
        ValueError: the config class refuses this width.
    """
    form = plan.stock
    assert form is not None
    values, heads = dense_config(anatomy, plan.kept_blocks), plan.heads(anatomy)
    if not (anatomy.table.heads_span_width or values.get("head_dim")):
        values["head_dim"] = _head_dim(anatomy.config)
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


def misfit(anatomy: Anatomy, plan: Plan) -> str | None:
    """Return the reason why a stock form can't hold a plan; None if it can.

    The config class validates the width. Then transformers builds the model on the meta device. Its parameters must be
    exactly the parameters that will be written, and its blocks of the kinds that they are of without a gap.
    """
    assert plan.stock is not None
    if not plan.stock.applies(anatomy.config):
        return "the type can't express this variant of the architecture"
    if plan.rotated and anatomy.table.has_post_norms:
        return "norms behind sublayers don't commute with a rotation"
    if plan.tied and anatomy.layer_norm and plan.rotated:
        return "tied embeddings behind LayerNorms need the custom class (--untie gives the stock form)"
    heads = plan.heads(anatomy)
    if heads is not None and anatomy.table.heads_span_width:
        width = _head_dim(anatomy.config) * heads.queries
        if width != plan.site_widths[0]:
            return f"the hidden size of this type is heads x head_dim, {width}"
    if anatomy.table.embedding_norm:
        return "the norm behind the embeddings is folded into their rows"
    if anatomy.table.neurons_field is None and set(plan.neurons_per_block) != {anatomy.neuron_count}:
        return "this type has four times as many neurons as its hidden size"
    if len(set(plan.neurons_per_block)) > 1:
        return "stock configs have one number of MLP neurons for all blocks"
    try:
        config = checked_config(stock_config(anatomy, plan, torch.float32))
    except ValueError as error:
        return first_line(error).partition(": ")[2] or first_line(error)
    model = empty_model(config)
    state = parameter_shapes(model)
    if plan.tied:
        state.pop(anatomy.table.lm_head + ".weight", None)
    ours = {name: shape for name, (_, shape) in layout(anatomy, plan).items()}
    different = sorted(name for name in state.keys() | ours.keys() if state.get(name) != ours.get(name))
    if different:
        return (
            f"{different[0]} would be {ours.get(different[0])}, the type has {state.get(different[0])} "
            f"({len(different)} such tensors)"
        )
    if plan.dropped_blocks:
        whole = checked_config(stock_config(anatomy, _with_all_blocks(anatomy, plan), torch.float32))
        kinds = block_kinds(whole, empty_model(whole), anatomy.table.layers)
        if block_kinds(config, model, anatomy.table.layers) != tuple(kinds[block] for block in plan.kept_blocks):
            return "the type can't keep the other blocks as they are"
    return None


def _with_all_blocks(anatomy: Anatomy, plan: Plan) -> Plan:
    """Return a stock plan with the same sizes that leaves out no block."""
    return replace(
        plan,
        dropped_blocks=(),
        neurons_per_block=plan.neurons_per_block[:1] * anatomy.block_count,
        site_widths=widths(anatomy, plan.basis, plan.site_widths[0]),
    )


def choose_form(
    anatomy: Anatomy, sizes: Sizes, *, basis: BasisKind = "global", tied: bool, choice: FormChoice = "auto"
) -> Plan:
    """Complete a plan: the first stock form that fits, else the custom class.

    Args:
        anatomy: The dense model.
        sizes: Sizes of the result.
        basis: Global or per-block.
        tied: True if embedding and head are to stay one matrix.
        choice: The form that the user asked for.

    Raises:
        OptionsError: a stock result was asked for and none fits.
    """
    blocks = anatomy.block_count - len(sizes.dropped_blocks)
    whole = basis == "global" and sizes.width == anatomy.width
    neurons = anatomy.neuron_count if sizes.neurons is None else sizes.neurons
    custom = Plan(
        basis,
        widths(anatomy, basis, sizes.width, blocks),
        tied,
        stock=None,
        neurons_per_block=neurons if isinstance(neurons, tuple) else (neurons,) * blocks,
        kv_heads=None if sizes.kv_heads == anatomy.kv_head_count else sizes.kv_heads,
        query_heads=_fewer_queries(anatomy, sizes),
        experts=None if sizes.experts == anatomy.expert_count else sizes.experts,
        dropped_blocks=sizes.dropped_blocks,
        rotated=not (whole and anatomy.table.has_post_norms),
    )
    if choice == "custom":
        return custom
    reasons: list[str] = []
    if basis == "per-block":
        reasons.append("no stock config has the shortcuts of a per-block basis")
    else:
        for form in anatomy.table.forms:
            if not (form.rotated or whole):
                reasons.append(f"{form.model_type}: the type can't hold this width")
                continue
            plan = replace(custom, stock=form, rotated=form.rotated)
            why = misfit(anatomy, plan)
            if why is None:
                return plan
            reasons.append(f"{form.model_type}: {why}")
    if choice == "stock":
        raise OptionsError(
            f"no stock config can hold width {sizes.width}: " + "; ".join(reasons),
            allowed="--form auto or --form custom, or another width",
            next_step=_how_to_save(anatomy, basis, sizes.width),
        )
    return custom


def _fewer_queries(anatomy: Anatomy, sizes: Sizes) -> int | None:
    """Return the number of query heads if each kept key/value head has fewer than in the dense model."""
    dense, queries = anatomy.head_counts, sizes.query_heads
    if dense is None or queries is None:
        return None
    kv = dense.kv if sizes.kv_heads is None else sizes.kv_heads
    return None if queries == kv * dense.group else queries


def _how_to_save(anatomy: Anatomy, basis: BasisKind, width: int) -> str:
    if not anatomy.table.stock:
        return "drop --form stock: the result will load by eigenslice's class; or keep the whole width"
    if basis == "per-block":
        return "drop --form stock, or pass --basis global"
    heads = anatomy.config.num_attention_heads
    return f"drop --form stock, or choose a width that divides by the {heads} heads such as {width // heads * heads}"


def stock_type_of(form: StockForm | None) -> str:
    """The model_type a result is saved as."""
    return form.model_type if form else SlicedConfig.model_type
