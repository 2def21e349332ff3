"""Rotating and slicing canonical weights (SliceGPT, sections 3.3 and 3.4).

A sliced stream is stored scaled by c = sqrt(width / D). A stock RMSNorm divides by the mean over `width` numbers, where
the dense norm divided by the mean over D numbers. With this scale both are equal: mean((c z)^2) over `width` is
sum(z^2) / D. So the norm needs neither a gain nor another epsilon, and only the readers need a factor, 1/c.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.arch import Sublayer
from eigenslice.arch.heads import HeadCounts, HeadRows
from eigenslice.model.folding import is_inside


@dataclass(frozen=True)
class SiteBasis:
    """The basis of one site.

    Attributes:
        matrix: Q, (D, width), orthonormal columns, float64.
        rotated: True if the stream leaves the dense model's coordinates; otherwise Q is the identity.
    """

    matrix: Tensor
    rotated: bool = True

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    @property
    def scale(self) -> float:
        """c = sqrt(width / D)."""
        return math.sqrt(self.width / self.matrix.shape[0])

    @property
    def reading(self) -> Tensor:
        """Q / c, (D, width): takes the sliced normalized stream to dense coordinates."""
        return self.matrix / self.scale

    def write(self, weight: Tensor) -> Tensor:
        """Weight (..., D, in) of a layer that writes the stream: c Q^T W."""
        return (self.scale * self.matrix.T).to(weight.dtype) @ weight

    def embed(self, rows: Tensor) -> Tensor:
        """Rows (..., D) of an embedding, a writer's bias or of the stream: c E Q."""
        return self.scale * (rows @ self.matrix.to(rows.dtype))

    def shortcut_to(self, other: "SiteBasis") -> Tensor:
        """Weight (other.width, width) that takes the stream to the other basis: (c' / c) Q'^T Q."""
        return (other.scale / self.scale) * (other.matrix.T @ self.matrix)


def identity_basis(width: int, device: torch.device | str) -> SiteBasis:
    """The dense model's own coordinates."""
    return SiteBasis(torch.eye(width, dtype=torch.float64, device=device), rotated=False)


@dataclass(frozen=True)
class Kept:
    """The units that are kept in a block's sublayers: indices, ascending; None keeps all.

    Attributes:
        neurons: Neurons of the MLP, (kept,); in a mixture neurons of each expert, (experts, kept).
        shared_neurons: Neurons of the shared experts that are cut with them, (kept,).
        query_heads: Query heads of the attention, (key/value heads, query heads of each), by their numbers in the
            dense model. The key/value heads are those that these query heads use.
        head_counts: Numbers of heads in the dense model.
        experts: Experts of a mixture, (experts,). `neurons` are of these experts.
    """

    neurons: Tensor | None = None
    shared_neurons: Tensor | None = None
    query_heads: Tensor | None = None
    head_counts: HeadCounts | None = None
    experts: Tensor | None = None

    def pick_experts(self, sublayer: Sublayer, part: str, tensor: Tensor) -> Tensor:
        """Return the kept experts' part of a parameter."""
        return tensor if self.experts is None or not sublayer.is_per_expert(part) else tensor[self.experts]

    def pick(self, sublayer: Sublayer, name: str, tensor: Tensor, axis: int) -> Tensor:
        """The kept part of a sublayer's weight or bias along one axis.

        Args:
            sublayer: The sublayer.
            name: Name of the reader or writer.
            tensor: Weight, out x in, or bias, (out,); stacked over the experts if there are any.
            axis: 0 for the outputs of readers, 1 for the inputs of writers.
        """
        neurons = self.shared_neurons if name in sublayer.shared else self.neurons
        if sublayer.has_neurons(name) and neurons is not None:
            gate = (1 if sublayer.interleaved else 0) if name in sublayer.gated else None
            if name in sublayer.stacked:
                pairs = zip(tensor, neurons, strict=True)
                return torch.stack([_pick_neurons(one, those, axis, gate) for one, those in pairs])
            return _pick_neurons(tensor, neurons, axis, gate)
        if name in sublayer.heads:
            return self._pick_heads(sublayer.heads[name], tensor, axis)
        return tensor

    def pick_inner(self, sublayer: Sublayer, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the kept parts of a sublayer's inner parameters, by their names in the result."""
        for name, tensor in tensors.items():
            found = sublayer.inner_heads(name)
            if found is None:
                yield name, self.pick_experts(sublayer, name, tensor)
            elif not found[1].modules:
                yield name, self._pick_heads(found[1], tensor, 0)
            else:
                module, rows = found
                number, _, leaf = name.removeprefix(f"{module}.").partition(".")
                places = self._places(rows)
                if places is None:
                    yield name, tensor
                elif int(number) in places:
                    yield f"{module}.{places.index(int(number))}.{leaf}", tensor

    def _places(self, rows: HeadRows) -> list[int] | None:
        """Return the kept runs of rows; None keeps all."""
        if self.query_heads is None or self.head_counts is None:
            return None
        return rows.kept(self.head_counts, self.query_heads.tolist())

    def _pick_heads(self, rows: HeadRows, tensor: Tensor, axis: int) -> Tensor:
        places = self._places(rows)
        if places is None or self.head_counts is None:
            return tensor
        parts = tensor.unflatten(axis, (len(rows.slots(self.head_counts)), -1))
        return parts.index_select(axis, torch.tensor(places, device=tensor.device)).flatten(axis, axis + 1)


def _pick_neurons(tensor: Tensor, neurons: Tensor, axis: int, gate: int | None) -> Tensor:
    """Return some neurons' rows or columns. The gate's rows are in front (gate=0), in turns (1) or absent (None)."""
    if gate is None:
        return tensor.index_select(axis, neurons)
    pairs = tensor.unflatten(0, (2, -1) if gate == 0 else (-1, 2))
    return pairs.index_select(1 - gate, neurons).flatten(0, 1)


ALL = Kept()
"""Nothing is cut."""


def keep_units(sublayer: Sublayer, folded: Mapping[str, Tensor], kept: Kept = ALL) -> Iterator[tuple[str, Tensor]]:
    """The weights of a sublayer's ends, with only some of its neurons, heads or experts, and the gain of its post norm.

    Args:
        sublayer: The sublayer.
        folded: Canonical weights of its decoder layer; names relative to the layer.
        kept: The neurons and heads to keep.

    Yields:
        Names and tensors.
    """
    for name in (*sublayer.ends, *sublayer.normed_writers):
        weight, bias = sublayer.weight(name), sublayer.bias(name)
        for part in (weight, bias):
            if part not in folded:
                continue
            tensor = kept.pick_experts(sublayer, part, folded[part])
            if name in sublayer.readers:
                tensor = kept.pick(sublayer, name, tensor, 0)
            elif part == weight:
                tensor = kept.pick(sublayer, name, tensor, 1)
            yield part, tensor
    if sublayer.post_norm:
        yield sublayer.post_gain, folded[sublayer.post_gain]


def keep_inner(sublayer: Sublayer, folded: Mapping[str, Tensor], kept: Kept = ALL) -> dict[str, Tensor]:
    """Return a sublayer's inner parameters, with only some heads or experts, by their names in the result."""
    return dict(kept.pick_inner(sublayer, {name: folded[name] for name in folded if is_inside(name, sublayer.inner)}))


def rotate_end(
    sublayer: Sublayer, part: str, tensor: Tensor, reading: Tensor, writing: SiteBasis
) -> tuple[str, Tensor]:
    """Return the name and value of what `keep_units` gave, for the stream in bases, in float32.

    That is the widest dtype that results are stored in. On consumer GPUs, products in float64 are 64 times slower.

    The gain of a post norm becomes the projection behind the norm, c Q^T diag(gain), if the stream is rotated.

    Args:
        sublayer: The sublayer.
        part: Name of the weight or bias.
        tensor: The tensor in the dense model's coordinates.
        reading: The readers' view of the normalized stream, (D, width).
        writing: The basis that writers write in.
    """
    tensor = tensor.to(torch.float32)
    if part in (sublayer.weight(name) for name in sublayer.readers):
        return part, tensor @ reading.to(tensor.dtype)
    if part in (sublayer.weight(name) for name in sublayer.writers):
        return part, writing.write(tensor)
    if sublayer.post_norm and part == sublayer.post_gain and writing.rotated:
        return sublayer.projection, writing.write(torch.diag(tensor))
    return part, writing.embed(tensor) if part in (sublayer.bias(name) for name in sublayer.writers) else tensor


def slice_block(
    sites: tuple[tuple[Sublayer, ...], ...],
    folded: Mapping[str, Tensor],
    bases: list[SiteBasis],
    *,
    shortcuts: bool,
    kept: Kept = ALL,
) -> Iterator[tuple[str, Tensor]]:
    """Rotate and slice one decoder layer, one tensor after the other.

    Args:
        sites: The sublayers at each of its sites.
        folded: Canonical weights of the layer; names relative to the layer.
        bases: The basis of each of its sites, then of the next layer's first one.
        shortcuts: Add the matrices on the skip connections.
        kept: Neurons and heads to keep.

    Yields:
        Names and tensors.
    """
    done: set[str] = set()
    for index, (sublayers, basis, following) in enumerate(zip(sites, bases[:-1], bases[1:], strict=True)):
        for sublayer in sublayers:
            for name, tensor in keep_units(sublayer, folded, kept):
                done.add(name)
                yield rotate_end(sublayer, name, tensor, basis.reading, following)
            yield from keep_inner(sublayer, folded, kept).items()
            done.update(name for name in folded if is_inside(name, sublayer.inner))
        if shortcuts:
            yield f"shortcuts.{index}.weight", basis.shortcut_to(following)
    for name in folded:
        if name not in done:
            yield name, folded[name]
