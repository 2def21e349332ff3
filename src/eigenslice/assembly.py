"""The parts of a result around its blocks: embeddings, norms, head, and what a stock config insists on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum, kept_basis, layer_norm_basis, tied_basis
from eigenslice.dense import DenseModel
from eigenslice.plan import Plan
from eigenslice.transform import SiteBasis

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class GlobalBasis:
    """One basis for all sites, and the final norm's gain where the embeddings stay tied."""

    site: SiteBasis
    tied_gain: Tensor | None


def global_basis(dense: DenseModel, plan: Plan, spectrum: Spectrum) -> GlobalBasis:
    """The kept basis for a plan's form."""
    width = plan.site_widths[0]
    if plan.tied:
        basis = kept_basis(spectrum, width, constant=dense.layer_norm)
        matrix, gain = tied_basis(basis, dense.final_gain())
        return GlobalBasis(SiteBasis(matrix), gain)
    if plan.stock and dense.layer_norm:
        return GlobalBasis(SiteBasis(layer_norm_basis(spectrum, width)), None)
    return GlobalBasis(SiteBasis(kept_basis(spectrum, width)), None)


def block_names(dense: DenseModel, index: int, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors under their names in the model."""
    return ((f"{dense.table.layers}.{index}.{name}", tensor) for name, tensor in tensors)


def slice_embeddings(
    dense: DenseModel, plan: Plan, basis: SiteBasis, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Weights of the token embedding and of learned positions, in a dtype."""
    for name, rows in dense.embeddings(centre=not plan.tied).items():
        yield name, rows.map(basis.embed, dtype)
    if plan.tied and dense.layer_norm:
        # The constant vector in the basis: the direction that a LayerNorm's mean subtraction removes
        yield dense.table.embeddings[0] + ".center", basis.matrix.sum(0) / dense.width**0.5


def slice_head(
    dense: DenseModel,
    plan: Plan,
    basis: SiteBasis,
    tied_gain: Tensor | None,
    dtype: torch.dtype,
    reading: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Weights of the final norm and the head.

    Args:
        dense: The model.
        plan: What the result looks like.
        basis: Of the site before the head.
        tied_gain: Gain of the final norm, in the basis; None if the head isn't tied.
        dtype: Of an untied head.
        reading: What an untied head reads from the normalized stream, (D, width); None is Q / c.
    """
    rows, bias = dense.head()
    head, norm = dense.table.head, dense.table.final_norm
    if not plan.tied:
        matrix = basis.reading if reading is None else reading
        yield head + ".weight", rows.map(lambda chunk: chunk @ matrix, dtype)
    if bias is not None:
        yield head + ".bias", bias
    if tied_gain is not None:
        yield norm + ".weight", tied_gain / basis.scale**2
    elif plan.stock:
        yield from _unit_norm(dense, norm, norm, basis.width)


def _unit_norm(dense: DenseModel, norm: str, dense_name: str, width: int) -> Iterator[tuple[str, Tensor]]:
    """The norm that a stock config insists on, with nothing left to do: gain 1, shift 0."""
    for kind, make in (("weight", torch.ones), ("bias", torch.zeros)):
        if f"{dense_name}.{kind}" in dense.shapes:
            yield f"{norm}.{kind}", make(width)


def stock_extras(dense: DenseModel, plan: Plan, index: int) -> Iterator[tuple[str, Tensor]]:
    """What a stock config insists on in a block and slicing leaves nothing for."""
    if plan.stock is None:
        return
    width = plan.site_widths[0]
    for norm in dict.fromkeys(sublayer.norm for sublayer in (dense.table.attention, dense.table.mlp)):
        yield from _unit_norm(dense, norm, f"{dense.table.layers}.{index}.{norm}", width)
    for module in plan.stock.zero_biases:
        yield module + ".bias", torch.zeros(width)
