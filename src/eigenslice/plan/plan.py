"""What a sliced model will look like, decided before a weight is touched, and what it will store."""

from dataclasses import dataclass
from typing import Any, Literal

from eigenslice.arch import StockForm
from eigenslice.model.dense import DenseModel

BasisKind = Literal["global", "per-block"]
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
