"""Rotating and slicing canonical weights (SliceGPT, sections 3.3 and 3.4).

A sliced stream is stored scaled by c = sqrt(width / D). A stock RMSNorm divides by the mean over `width` numbers
where the dense one divided by the mean over D, and mean((c z)^2) over `width` is sum(z^2) / D: with this scale
the norm needs neither a gain nor another epsilon, and all that's left is 1/c in the readers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.arch import Sublayer


@dataclass(frozen=True)
class SiteBasis:
    """The basis of one site.

    Attributes:
        matrix: Q, (D, width), orthonormal columns, float64.
    """

    matrix: Tensor

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    @property
    def scale(self) -> float:
        """c = sqrt(width / D)."""
        return math.sqrt(self.width / self.matrix.shape[0])

    @property
    def reading(self) -> Tensor:
        """Q / c, (D, width): the normalized stream in dense coordinates, from the sliced one's."""
        return self.matrix / self.scale

    def read(self, weight: Tensor) -> Tensor:
        """Weight (out, D) of a layer that reads the normalized stream: W Q / c."""
        return weight @ self.reading

    def write(self, weight: Tensor) -> Tensor:
        """Weight (D, in) or bias (D,) of a layer that writes the stream: c Q^T W."""
        return (self.scale * self.matrix.T) @ weight

    def embed(self, rows: Tensor) -> Tensor:
        """Rows (..., D) of an embedding or of the stream: c E Q."""
        return self.scale * (rows @ self.matrix.to(rows.dtype))

    def shortcut_to(self, other: "SiteBasis") -> Tensor:
        """Weight (other.width, width) that takes the stream to the other basis: (c' / c) Q'^T Q."""
        return (other.scale / self.scale) * (other.matrix.T @ self.matrix)


def identity_basis(width: int, device: torch.device | str) -> SiteBasis:
    """The dense model's own coordinates."""
    return SiteBasis(torch.eye(width, dtype=torch.float64, device=device))


def keep_neurons(sublayer: Sublayer, folded: Mapping[str, Tensor], kept: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The weights of a sublayer's readers and writers with only some of its neurons; None keeps all.

    Args:
        sublayer: Whose neurons.
        folded: Canonical weights of its decoder layer; names relative to the layer.
        kept: Indices, ascending.

    Yields:
        Names and tensors.
    """
    for module in (*sublayer.readers, *sublayer.writers):
        for name in (module + ".weight", module + ".bias"):
            if name not in folded:
                continue
            tensor = folded[name]
            if kept is not None and module in sublayer.readers:
                tensor = tensor[kept]
            elif kept is not None and name.endswith(".weight"):
                tensor = tensor[:, kept]
            yield name, tensor


def slice_block(
    sites: tuple[tuple[Sublayer, ...], ...],
    folded: Mapping[str, Tensor],
    bases: list[SiteBasis],
    shortcuts: bool,
    kept: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Rotate and slice one decoder layer, one tensor after the other.

    Args:
        sites: The sublayers at each of its sites.
        folded: Its canonical weights; names relative to the layer.
        bases: The basis of each of its sites, then of the next layer's first one.
        shortcuts: Add the matrices on the skip connections.
        kept: MLP neurons to keep, ascending; None keeps all.

    Yields:
        Names and tensors.
    """
    done: set[str] = set()
    for index, (sublayers, basis, following) in enumerate(zip(sites, bases[:-1], bases[1:], strict=True)):
        for sublayer in sublayers:
            for name, tensor in keep_neurons(sublayer, folded, kept if sublayer.neurons else None):
                done.add(name)
                module, _, kind = name.rpartition(".")
                if module in sublayer.writers:
                    yield name, following.write(tensor)
                else:
                    yield name, basis.read(tensor) if kind == "weight" else tensor
        if shortcuts:
            yield f"shortcuts.{index}.weight", basis.shortcut_to(following)
    for name in folded:
        if name not in done:
            yield name, folded[name]
