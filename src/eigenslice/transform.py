"""Rotating and slicing canonical weights (SliceGPT, sections 3.3 and 3.4).

A sliced stream is stored scaled by c = sqrt(width / D). A stock RMSNorm divides by the mean over `width` numbers
where the dense one divided by the mean over D, and mean((c z)^2) over `width` is sum(z^2) / D: with this scale
the norm needs neither a gain nor another epsilon, and all that's left is 1/c in the readers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.arch import Sublayer
from eigenslice.dense import Tensors


@dataclass(frozen=True)
class SiteBasis:
    """The basis of one site.

    Attributes:
        matrix: Q, (D, width), orthonormal columns, float64.
        reading: T, (D, width): what readers read instead of Q once they are refitted; None is Q.
    """

    matrix: Tensor
    reading: Tensor | None = None

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    @property
    def scale(self) -> float:
        """c = sqrt(width / D)."""
        return math.sqrt(self.width / self.matrix.shape[0])

    def read(self, weight: Tensor) -> Tensor:
        """Weight (out, D) of a layer that reads the normalized stream: W Q / c, refitted W T / c."""
        return weight @ (self.matrix if self.reading is None else self.reading) / self.scale

    def write(self, weight: Tensor) -> Tensor:
        """Weight (D, in) or bias (D,) of a layer that writes the stream: c Q^T W."""
        return self.scale * (self.matrix.T @ weight)

    def embed(self, rows: Tensor) -> Tensor:
        """Rows (n, D) of an embedding: c E Q."""
        return self.scale * (rows @ self.matrix)

    def shortcut_to(self, other: "SiteBasis") -> Tensor:
        """Weight (other.width, width) that takes the stream to the other basis: (c' / c) Q'^T Q."""
        return (other.scale / self.scale) * (other.matrix.T @ self.matrix)


def identity_basis(width: int, device: torch.device | str) -> SiteBasis:
    """The dense model's own coordinates."""
    return SiteBasis(torch.eye(width, dtype=torch.float64, device=device))


def slice_block(
    sites: tuple[tuple[Sublayer, ...], ...], folded: Tensors, bases: list[SiteBasis], shortcuts: bool
) -> Tensors:
    """Rotate and slice one decoder layer.

    Args:
        sites: The sublayers at each of its sites.
        folded: Its canonical weights; names relative to the layer.
        bases: The basis of each of its sites, then of the next layer's first one.
        shortcuts: Add the matrices on the skip connections.
    """
    result = dict(folded)
    for index, (sublayers, basis, following) in enumerate(zip(sites, bases[:-1], bases[1:], strict=True)):
        for sublayer in sublayers:
            for module in sublayer.readers:
                result[module + ".weight"] = basis.read(folded[module + ".weight"])
            for module in sublayer.writers:
                for name in (module + ".weight", module + ".bias"):
                    if name in folded:
                        result[name] = following.write(folded[name])
        if shortcuts:
            result[f"shortcuts.{index}.weight"] = basis.shortcut_to(following)
    return result
