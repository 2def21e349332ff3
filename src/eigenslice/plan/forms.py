"""The forms a result can be saved in: a stock config of transformers where one fits, else the custom class."""

from dataclasses import replace
from typing import Literal

import torch

from eigenslice.arch import StockForm
from eigenslice.checkpoint.empty import empty_model
from eigenslice.errors import OptionsError, first_line
from eigenslice.model.anatomy import Anatomy, parameter_shapes
from eigenslice.model.block_kinds import block_kinds
from eigenslice.modeling import SlicedConfig
from eigenslice.plan.layout import layout
from eigenslice.plan.plan import BasisKind, Plan, Sizes, widths
from eigenslice.plan.result_config import checked_config, head_dim, stock_config

FormChoice = Literal["auto", "stock", "custom"]


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
        width = head_dim(anatomy.config) * heads.queries
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
