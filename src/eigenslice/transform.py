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

    def write(self, weight: Tensor) -> Tensor:
        """Weight (..., D, in) of a layer that writes the stream: c Q^T W."""
        return (self.scale * self.matrix.T) @ weight

    def embed(self, rows: Tensor) -> Tensor:
        """Rows (..., D) of an embedding, a writer's bias or of the stream: c E Q."""
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
    for name in sublayer.ends:
        weight, bias = sublayer.weight(name), sublayer.bias(name)
        for part in (weight, bias):
            if part not in folded:
                continue
            tensor = folded[part]
            if kept is not None and name in sublayer.gated:
                tensor = tensor.unflatten(0, (2, -1))[:, kept].flatten(0, 1)
            elif kept is not None and name in sublayer.readers:
                tensor = tensor[kept]
            elif kept is not None and part == weight:
                tensor = tensor[:, kept]
            yield part, tensor


def turn_end(sublayer: Sublayer, part: str, tensor: Tensor, reading: Tensor, writing: SiteBasis) -> Tensor:
    """A weight or bias of a sublayer's reader or writer, for the stream in bases.

    Args:
        sublayer: Whose.
        part: Name of the weight or bias.
        tensor: As it is in the dense model's coordinates.
        reading: What readers get from the normalized stream, (D, width).
        writing: The basis that writers write in.
    """
    if part in (sublayer.weight(name) for name in sublayer.readers):
        return tensor @ reading
    if part in (sublayer.weight(name) for name in sublayer.writers):
        return writing.write(tensor)
    return writing.embed(tensor) if part in (sublayer.bias(name) for name in sublayer.writers) else tensor


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
                yield name, turn_end(sublayer, name, tensor, basis.reading, following)
        if shortcuts:
            yield f"shortcuts.{index}.weight", basis.shortcut_to(following)
    for name in folded:
        if name not in done:
            yield name, folded[name]
