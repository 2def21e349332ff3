"""The parts of a result around its blocks: embeddings, norms, head, and what a stock config insists on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum, kept_basis, layer_norm_basis, tied_basis
from eigenslice.dense import DenseModel, Tensors
from eigenslice.plan import Plan
from eigenslice.transform import SiteBasis


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


def block_names(dense: DenseModel, index: int, tensors: Tensors) -> Tensors:
    """A block's tensors under their names in the model."""
    return {f"{dense.table.layers}.{index}.{name}": tensor for name, tensor in tensors.items()}


def slice_embeddings(dense: DenseModel, plan: Plan, basis: SiteBasis) -> Tensors:
    """Weights of the token embedding and of learned positions."""
    tensors = {name: basis.embed(w) for name, w in dense.embeddings(centre=not plan.tied).items()}
    if plan.tied and dense.layer_norm:
        # The constant vector in the basis: the direction that a LayerNorm's mean subtraction removes
        tensors[dense.table.embeddings[0] + ".center"] = basis.matrix.sum(0) / dense.width**0.5
    return tensors


def slice_head(
    dense: DenseModel, plan: Plan, basis: SiteBasis, tied_gain: Tensor | None, reading: Tensor | None = None
) -> Tensors:
    """Weights of the final norm and the head.

    Args:
        dense: The model.
        plan: What the result looks like.
        basis: Of the site before the head.
        tied_gain: Gain of the final norm, in the basis; None if the head isn't tied.
        reading: What an untied head reads from the normalized stream, (D, width); None is Q / c.
    """
    weight, bias = dense.head()
    head, norm = dense.table.head, dense.table.final_norm
    tensors = {} if plan.tied else {head + ".weight": weight @ (basis.reading if reading is None else reading)}
    if bias is not None:
        tensors[head + ".bias"] = bias
    if tied_gain is not None:
        tensors[norm + ".weight"] = tied_gain / basis.scale**2
    elif plan.stock:
        tensors |= _unit_norm(dense, norm, norm, basis.width)
    return tensors


def _unit_norm(dense: DenseModel, norm: str, dense_name: str, width: int) -> Tensors:
    """The norm that a stock config insists on, with nothing left to do: gain 1, shift 0."""
    kinds = {"weight": torch.ones, "bias": torch.zeros}
    return {f"{norm}.{k}": make(width) for k, make in kinds.items() if f"{dense_name}.{k}" in dense.shapes}


def stock_extras(dense: DenseModel, plan: Plan, index: int) -> Tensors:
    """What a stock config insists on in a block and slicing leaves nothing for."""
    if plan.stock is None:
        return {}
    tensors: Tensors = {}
    width = plan.site_widths[0]
    for sublayer in (dense.table.attention, dense.table.mlp):
        dense_name = f"{dense.table.layers}.{index}.{sublayer.norm}"
        tensors |= _unit_norm(dense, sublayer.norm, dense_name, width)
    for module in plan.stock.zero_biases:
        tensors[module + ".bias"] = torch.zeros(width)
    return tensors
