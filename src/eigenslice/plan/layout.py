"""Shapes that a plan stores, and how many parameters these are."""

import math
from typing import Literal

from eigenslice.arch import Sublayer
from eigenslice.arch.heads import HeadRows
from eigenslice.model.anatomy import Anatomy, Shape
from eigenslice.model.folding import is_inside
from eigenslice.plan.plan import Plan, full_plan

Role = Literal["embedding", "attention", "mlp", "norm", "head", "shortcut"]


def layout(anatomy: Anatomy, plan: Plan) -> dict[str, tuple[Role, Shape]]:
    """Role and shape of every stored parameter, by transformers' name in the result, where blocks are numbered anew.

    Shortcuts, the norms that a stock config insists on and biases that hold a folded shift are included.
    """
    table, stock = anatomy.table, plan.stock
    result: dict[str, tuple[Role, Shape]] = {}
    for module in table.embeddings:
        name = module + ".weight"
        result[name] = ("embedding", (anatomy.shapes[name][0], plan.site_widths[0]))
    for name, rows in () if stock else anatomy.fixed_positions.items():  # a stock class computes them
        result[name] = ("embedding", (rows, plan.site_widths[0]))
    if plan.tied and anatomy.layer_norm and not stock:
        result[table.embeddings[0] + ".center"] = ("embedding", (plan.site_widths[0],))
    sites = len(anatomy.sites)
    for index, block in enumerate(plan.kept_blocks):
        ends = plan.site_widths[index * sites : (index + 1) * sites + 1]
        before, after = (f"{table.layers}.{number}." for number in (block, index))
        of_block = _block_layout(anatomy, plan, before, ends, plan.neurons_per_block[index])
        result |= {after + name.removeprefix(before): entry for name, entry in of_block.items()}
    final = plan.site_widths[-1]
    for kind in ("weight", "bias"):
        name = f"{table.final_norm}.{kind}"
        if name in anatomy.shapes if stock else plan.tied and kind == "weight":
            result[name] = ("norm", (final,))
    if not plan.tied:
        result[table.lm_head + ".weight"] = ("head", (anatomy.tokens, final))
    if anatomy.keeps_bias(table.lm_head + ".bias", stock=stock is not None):
        result[table.lm_head + ".bias"] = ("head", (anatomy.tokens,))
    return result


def _block_layout(
    anatomy: Anatomy, plan: Plan, prefix: str, ends: tuple[int, ...], neurons: int
) -> dict[str, tuple[Role, Shape]]:
    """Return the layout of one decoder layer, by its names in the dense model, which begin with `prefix`.

    `ends` are the widths at its sites and at the next layer's first site.
    """
    result: dict[str, tuple[Role, Shape]] = {}
    stock = plan.stock is not None
    for site, sublayers in enumerate(anatomy.sites):
        width, following = ends[site : site + 2]
        for sublayer in sublayers:
            role: Role = "attention" if sublayer is anatomy.table.attention else "mlp"
            for name in (*sublayer.ends, *sublayer.normed_writers):
                weight, bias = prefix + sublayer.weight(name), prefix + sublayer.bias(name)
                if weight not in anatomy.shapes:
                    continue  # this layer is of another kind
                *experts, outputs, inputs = sublayer.transpose_shape(name, anatomy.shapes[weight])
                if name in sublayer.readers:
                    inputs = width
                    outputs = _rows_of_heads(anatomy, plan, sublayer.heads.get(name), outputs)
                    if sublayer.has_neurons(name):
                        outputs = outputs // anatomy.neuron_count * neurons  # gate and up in one, or shared: a multiple
                    biased = anatomy.keeps_bias(
                        bias, stock=stock or (anatomy.carries_shifts and bool(sublayer.stacked))
                    )
                else:
                    outputs = following if name in sublayer.writers else outputs
                    if sublayer.has_neurons(name):
                        inputs = inputs // anatomy.neuron_count * neurons
                    inputs = _rows_of_heads(anatomy, plan, sublayer.heads.get(name), inputs)
                    zero = plan.stock is not None and name in plan.stock.zero_biases
                    biased = zero or bias in anatomy.shapes
                experts, outputs = _numbers_of_experts(plan, sublayer, name, experts, outputs)
                result[weight] = (role, sublayer.transpose_shape(name, (*experts, outputs, inputs)))
                if biased:
                    result[bias] = (role, (*experts, outputs))
            if sublayer.post_norm and plan.rotated:
                result[prefix + sublayer.projection] = (role, (following, anatomy.width))
            elif sublayer.post_norm:
                result[prefix + sublayer.post_gain] = ("norm", (anatomy.width,))
            inner = _inner_shapes(anatomy, plan, prefix, sublayer)
            result |= {name: (role, shape) for name, shape in inner.items()}
            for kind in ("weight", "bias"):
                if stock and f"{prefix}{sublayer.norm}.{kind}" in anatomy.shapes:
                    result[f"{prefix}{sublayer.norm}.{kind}"] = ("norm", (width,))
        if plan.shortcuts:
            result[f"{prefix}shortcuts.{site}.weight"] = ("shortcut", (following, width))
    return result


def _numbers_of_experts(
    plan: Plan, sublayer: Sublayer, name: str, experts: list[int], outputs: int
) -> tuple[list[int], int]:
    """Return the axis of experts, if there is one, and the rows of a weight, of which a router has one an expert."""
    if plan.experts is None or not sublayer.is_per_expert(sublayer.weight(name)):
        return experts, outputs
    return ([plan.experts], outputs) if experts else ([], plan.experts)


def _rows_of_heads(anatomy: Anatomy, plan: Plan, rows: HeadRows | None, count: int) -> int:
    """Return the number of rows that a plan keeps of a weight with so many rows; None: they belong to no heads."""
    dense, heads = anatomy.head_counts, plan.heads(anatomy)
    return count if rows is None or dense is None or heads is None else rows.resized(count, dense, heads)


def _inner_shapes(anatomy: Anatomy, plan: Plan, prefix: str, sublayer: Sublayer) -> dict[str, Shape]:
    """Return the shapes of a sublayer's parameters that touch the stream at neither end, by their full names."""
    result: dict[str, Shape] = {}
    heads = plan.heads(anatomy)
    for name, shape in anatomy.shapes.items():
        part = name.removeprefix(prefix)
        if not (name.startswith(prefix) and is_inside(part, sublayer.inner)):
            continue
        if plan.experts is not None and sublayer.is_per_expert(part):
            result[name] = (plan.experts, *shape[1:])
            continue
        found = sublayer.inner_heads(part)
        if found is None or heads is None:
            result[name] = shape
        elif not found[1].modules:
            result[name] = (_rows_of_heads(anatomy, plan, found[1], shape[0]), *shape[1:])
        elif int(part.removeprefix(f"{found[0]}.").partition(".")[0]) < len(found[1].slots(heads)):
            result[name] = shape
    return result


def count(shapes: dict[str, tuple[Role, Shape]]) -> dict[Role, int]:
    """Stored parameters by role."""
    totals: dict[Role, int] = {}
    for role, shape in shapes.values():
        totals[role] = totals.get(role, 0) + math.prod(shape)
    return totals


def stored_parameters(anatomy: Anatomy, plan: Plan) -> int:
    """Stored parameters of a sliced model: the honest size."""
    return sum(count(layout(anatomy, plan)).values())


def dense_roles(anatomy: Anatomy) -> dict[str, int]:
    """Parameters of the dense model by role; norms, which slicing folds away, have their own."""
    names = {name: role for name, (role, _) in layout(anatomy, full_plan(anatomy, tied=anatomy.can_stay_tied)).items()}
    totals: dict[str, int] = {}
    for name, shape in anatomy.shapes.items():
        role = names.get(name, "norm")
        totals[role] = totals.get(role, 0) + math.prod(shape) + anatomy.dropped_parameters.get(name, 0)
    return totals
