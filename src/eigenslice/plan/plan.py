"""The sizes and the form of a sliced model, decided before a weight is touched."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from eigenslice.arch import StockForm
from eigenslice.arch.heads import HeadCounts
from eigenslice.model.anatomy import Anatomy

BasisKind = Literal["global", "per-block"]
FEWEST_NEURONS = 0.25
"""Share of its MLP neurons that every block keeps; plans for a size that need fewer cut the width instead."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a plan is made from.

    Attributes:
        width: Hidden width.
        neurons: Number of MLP neurons in every block, or a number for each kept block; None keeps all.
        kv_heads: Number of key/value heads in every block; None keeps all.
        query_heads: Number of query heads in every block, equally many for each kept key/value head; None keeps all
            of the kept key/value heads.
        dropped_blocks: Numbers of the dense model's blocks that are left out.
        experts: Number of experts in every mixture; None keeps all.
    """

    width: int
    neurons: int | tuple[int, ...] | None = None
    kv_heads: int | None = None
    dropped_blocks: tuple[int, ...] = ()
    query_heads: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class Plan:
    """The widths of a sliced model and the form it is saved in.

    Attributes:
        basis: A global basis for all sites, or a basis for each site.
        site_widths: Width of the stream at each site; the last one is before the head.
        tied: True if embedding and head stay one matrix.
        stock: The config class of the result, None for the custom class.
        neurons_per_block: Number of MLP neurons in each block, or in each of its experts. Stock configs hold one number
            for all blocks.
        kv_heads: Number of key/value heads in every block, each with its query heads; None is the dense model's.
        query_heads: Number of query heads in every block, equally many for each kept key/value head; None is as many
            for each as in the dense model.
        dropped_blocks: Numbers of the dense model's blocks that are left out. `neurons_per_block` and `site_widths` are
            of the other blocks.
        rotated: True if the stream leaves the dense model's coordinates. Otherwise all of the width is kept, and the
            result can have norms that don't commute with a rotation.
        experts: Number of experts in every mixture; None is the dense model's.
    """

    basis: BasisKind
    site_widths: tuple[int, ...]
    tied: bool
    stock: StockForm | None
    neurons_per_block: tuple[int, ...]
    kv_heads: int | None = None
    dropped_blocks: tuple[int, ...] = ()
    rotated: bool = True
    query_heads: int | None = None
    experts: int | None = None

    def heads(self, anatomy: Anatomy) -> HeadCounts | None:
        """Return the numbers of heads in each block; None if none were cut."""
        dense = anatomy.head_counts
        if dense is None or (self.kv_heads is None and self.query_heads is None):
            return None
        kv = self.kv_heads or dense.kv
        return HeadCounts(kv, dense.group if self.query_heads is None else self.query_heads // kv)

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Numbers of the dense model's blocks that are kept, in order."""
        count = len(self.neurons_per_block) + len(self.dropped_blocks)
        return tuple(block for block in range(count) if block not in self.dropped_blocks)

    @property
    def shortcuts(self) -> bool:
        """True if the skip connections carry matrices."""
        return self.basis == "per-block"

    def cuts(self, anatomy: Anatomy) -> bool:
        """Return whether anything is smaller than in the dense model."""
        heads, dense = self.heads(anatomy), anatomy.head_counts
        fewer = heads is not None and dense is not None and heads.queries < dense.queries
        fewer = fewer or bool(self.dropped_blocks) or self.experts is not None
        return fewer or min(self.site_widths) < anatomy.width or min(self.neurons_per_block) < anatomy.neuron_count

    def describe(self) -> dict[str, Any]:
        """The plan in numbers, as the manifest and recipe files hold it."""
        width, neurons = self.site_widths[0], sorted(set(self.neurons_per_block))
        numbers: dict[str, Any] = {
            "basis": self.basis,
            "width": width,
            "neurons": neurons[0] if len(neurons) == 1 else list(self.neurons_per_block),
            "tied": self.tied,
        }
        numbers |= {} if self.kv_heads is None else {"key_value_heads": self.kv_heads}
        numbers |= {} if self.query_heads is None else {"query_heads": self.query_heads}
        numbers |= {} if self.experts is None else {"experts": self.experts}
        return numbers | ({"dropped_blocks": list(self.dropped_blocks)} if self.dropped_blocks else {})


def widths(anatomy: Anatomy, basis: BasisKind, width: int, blocks: int | None = None) -> tuple[int, ...]:
    """Width at each site. Per-block, as in the paper, the last block's output keeps the dense width, if it can.

    Args:
        anatomy: The dense model.
        basis: Global or per-block.
        width: The width that is kept.
        blocks: Number of kept blocks; None is all.
    """
    sites = (anatomy.block_count if blocks is None else blocks) * len(anatomy.sites)
    return (width,) * sites + (width if basis == "global" or anatomy.table.one_width else anatomy.width,)


def most_neurons(plans: Iterable[Plan]) -> int:
    """Return the largest number of neurons that an MLP has in any of the plans."""
    return max(count for plan in plans for count in plan.neurons_per_block)


def full_plan(anatomy: Anatomy, *, tied: bool) -> Plan:
    """The plan that cuts nothing, in the custom class."""
    site_widths, rotated = widths(anatomy, "global", anatomy.width), not anatomy.table.has_post_norms
    return Plan("global", site_widths, tied, None, anatomy.neurons_per_block, rotated=rotated)
