"""What a sliced model will look like, decided before a weight is touched, and what it will store."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from eigenslice.arch import StockForm
from eigenslice.dense import DenseModel
from eigenslice.folding import is_inside

BasisKind = Literal["global", "per-block"]
Role = Literal["embedding", "attention", "mlp", "norm", "head", "shortcut"]
Shape = tuple[int, ...]
FEWEST_NEURONS = 0.25
"""Share of its MLP neurons that every block keeps; plans for a size that need fewer cut the width instead."""


@dataclass(frozen=True)
class Plan:
    """The widths of a sliced model and the form it is saved in.

    Attributes:
        basis: One basis for all sites, or one each.
        site_widths: Width of the stream at each site; the last one is before the head.
        tied: Whether embedding and head stay one matrix.
        stock: The config class that holds it, None for the custom class.
        neurons: Number of MLP neurons in each block, or in each of its experts. Stock configs hold one number for all.
        heads: Number of key/value heads in every block, each with its query heads; None is the dense model's.
        dropped: Numbers of the dense model's blocks that are left out. `neurons` and `site_widths` are of the others.
    """

    basis: BasisKind
    site_widths: tuple[int, ...]
    tied: bool
    stock: StockForm | None
    neurons: tuple[int, ...]
    heads: int | None = None
    dropped: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the dense model's blocks that are kept, in order."""
        count = len(self.neurons) + len(self.dropped)
        return tuple(block for block in range(count) if block not in self.dropped)

    @property
    def shortcuts(self) -> bool:
        """Whether the skip connections carry matrices."""
        return self.basis == "per-block"

    def cuts(self, dense: DenseModel) -> bool:
        """Whether anything is smaller than in the dense model."""
        fewer = self.heads is not None and self.heads < dense.heads
        fewer = fewer or bool(self.dropped)
        return fewer or min(self.site_widths) < dense.width or min(self.neurons) < dense.neurons

    def describe(self) -> dict[str, Any]:
        """The plan in numbers, as the manifest and recipe files hold it."""
        width, neurons = self.site_widths[0], sorted(set(self.neurons))
        numbers: dict[str, Any] = {
            "basis": self.basis,
            "width": width,
            "neurons": neurons[0] if len(neurons) == 1 else list(self.neurons),
            "tied": self.tied,
        }
        numbers |= {} if self.heads is None else {"key_value_heads": self.heads}
        return numbers | ({"dropped_blocks": list(self.dropped)} if self.dropped else {})


def widths(dense: DenseModel, basis: BasisKind, width: int, blocks: int | None = None) -> tuple[int, ...]:
    """Width at each site. Per-block, as in the paper, the last block's output keeps the dense width, if it can.

    Args:
        dense: The model.
        basis: Global or per-block.
        width: That is kept.
        blocks: How many are kept; None is all.
    """
    sites = (dense.blocks if blocks is None else blocks) * len(dense.table.sites(dense.config))
    return (width,) * sites + (width if basis == "global" or dense.table.one_width else dense.width,)


def full_plan(dense: DenseModel, tied: bool) -> Plan:
    """The plan that cuts nothing, in the custom class."""
    return Plan("global", widths(dense, "global", dense.width), tied, None, (dense.neurons,) * dense.blocks)


def layout(dense: DenseModel, plan: Plan) -> dict[str, tuple[Role, Shape]]:
    """Role and shape of every stored parameter, by transformers' name of the dense model's.

    Shortcuts, the norms that a stock config insists on and biases that hold a folded shift are included.
    """
    table, stock = dense.table, plan.stock
    result: dict[str, tuple[Role, Shape]] = {}
    for module in table.embeddings:
        name = module + ".weight"
        result[name] = ("embedding", (dense.shapes[name][0], plan.site_widths[0]))
    for name, rows in dense.sinusoids.items():
        result[name] = ("embedding", (rows.shape[0], plan.site_widths[0]))
    if plan.tied and dense.layer_norm:
        result[table.embeddings[0] + ".center"] = ("embedding", (plan.site_widths[0],))
    sites = len(table.sites(dense.config))
    for index in range(len(plan.neurons)):  # blocks are left out only where all are alike
        ends = plan.site_widths[index * sites : (index + 1) * sites + 1]
        result |= _block_layout(dense, plan, f"{table.layers}.{index}.", ends, plan.neurons[index])
    final = plan.site_widths[-1]
    for kind in ("weight", "bias"):
        name = f"{table.final_norm}.{kind}"
        if (stock and name in dense.shapes) or (plan.tied and kind == "weight"):
            result[name] = ("norm", (final,))
    vocabulary = dense.shapes[table.embeddings[0] + ".weight"][0]
    if not plan.tied:
        result[table.head + ".weight"] = ("head", (vocabulary, final))
    if dense.keeps_bias(table.head + ".bias", stock is not None):
        result[table.head + ".bias"] = ("head", (vocabulary,))
    return result


def _block_layout(
    dense: DenseModel, plan: Plan, prefix: str, ends: tuple[int, ...], neurons: int
) -> dict[str, tuple[Role, Shape]]:
    """As `layout`, for one decoder layer; ends: the widths at its sites and at the next layer's first one."""
    result: dict[str, tuple[Role, Shape]] = {}
    stock = plan.stock is not None
    for site, sublayers in enumerate(dense.table.sites(dense.config)):
        width, following = ends[site : site + 2]
        for sublayer in sublayers:
            role: Role = "attention" if sublayer is dense.table.attention else "mlp"
            for name in sublayer.ends:
                weight, bias = prefix + sublayer.weight(name), prefix + sublayer.bias(name)
                if sublayer.post_norm and name in sublayer.writers:
                    *experts, outputs, inputs = dense.width, dense.width
                elif weight in dense.shapes:
                    *experts, outputs, inputs = sublayer.turn(name, dense.shapes[weight])
                else:
                    continue  # this layer is of another kind
                heads = plan.heads if sublayer.heads else None
                if name in sublayer.readers:
                    inputs = width
                    if heads is not None:
                        outputs = outputs // dense.heads * heads
                    if sublayer.has_neurons(name):
                        outputs = outputs // dense.neurons * neurons  # gate and up in one, or shared: a multiple
                    biased = dense.keeps_bias(bias, stock or (dense.carries_shifts and bool(sublayer.stacked)))
                else:
                    outputs = following
                    if sublayer.has_neurons(name):
                        inputs = inputs // dense.neurons * neurons
                    if heads is not None:
                        inputs = inputs // dense.heads * heads
                    zero = plan.stock is not None and name in plan.stock.zero_biases
                    biased = zero or bias in dense.shapes
                result[weight] = (role, sublayer.turn(name, (*experts, outputs, inputs)))
                if biased:
                    result[bias] = (role, (*experts, outputs))
            result |= {
                name: (role, shape)
                for name, shape in dense.shapes.items()
                if name.startswith(prefix) and is_inside(name.removeprefix(prefix), sublayer.inner)
            }
            for kind in ("weight", "bias"):
                if stock and f"{prefix}{sublayer.norm}.{kind}" in dense.shapes:
                    result[f"{prefix}{sublayer.norm}.{kind}"] = ("norm", (width,))
        if plan.shortcuts:
            result[f"{prefix}shortcuts.{site}.weight"] = ("shortcut", (following, width))
    return result


def count(shapes: dict[str, tuple[Role, Shape]]) -> dict[Role, int]:
    """Stored parameters by role."""
    totals: dict[Role, int] = {}
    for role, shape in shapes.values():
        totals[role] = totals.get(role, 0) + math.prod(shape)
    return totals


def stored_parameters(dense: DenseModel, plan: Plan) -> int:
    """Stored parameters of a sliced model: the honest size."""
    return sum(count(layout(dense, plan)).values())


def dense_roles(dense: DenseModel) -> dict[str, int]:
    """Parameters of the dense model by role; norms, which slicing folds away, have their own."""
    names = {name: role for name, (role, _) in layout(dense, full_plan(dense, dense.can_stay_tied)).items()}
    totals: dict[str, int] = {}
    for name, shape in dense.shapes.items():
        role = names.get(name, "norm")
        totals[role] = totals.get(role, 0) + math.prod(shape)
    return totals
