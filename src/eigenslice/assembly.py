"""The parts of a result around its blocks: embeddings, norms, head, and what a stock config insists on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum, kept_basis, layer_norm_basis, tied_basis
from eigenslice.dense import DenseModel, Tensors, carry
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
    return GlobalBasis(site_basis(dense, spectrum, width, plan.stock is not None), None)


def site_basis(dense: DenseModel, spectrum: Spectrum, width: int, stock: bool = False) -> SiteBasis:
    """The kept basis of a site whose norm is a stock class's, or the custom one's."""
    if (stock and dense.layer_norm) or dense.carries_shifts:
        return SiteBasis(layer_norm_basis(spectrum, width))
    return SiteBasis(kept_basis(spectrum, width))


def block_names(dense: DenseModel, index: int, tensors: Tensors, width: int) -> Tensors:
    """A block's tensors (out x in) as its modules hold them, under their names in the model."""
    return {f"{dense.table.layers}.{index}.{name}": t for name, t in dense.as_modules(tensors, width).items()}


def slice_embeddings(dense: DenseModel, plan: Plan, basis: SiteBasis) -> Tensors:
    """Weights of the token embedding and of positions."""
    tensors = {name: basis.embed(w) for name, w in dense.embeddings(centre=not plan.tied).items()}
    token = dense.table.embeddings[0]
    if plan.stock and dense.table.width_scales_embedding:
        # The class now multiplies by another width's root
        tensors[token + ".weight"] = tensors[token + ".weight"] / basis.scale
    if plan.tied and dense.layer_norm:
        # The constant vector in the basis: the direction that a LayerNorm's mean subtraction removes
        tensors[token + ".center"] = basis.matrix.sum(0) / dense.width**0.5
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
        scaled = plan.stock is not None and dense.table.width_scales_embedding
        gain = tied_gain / (basis.scale if scaled else basis.scale**2)
        tensors[norm + ".weight"] = gain - 1 if plan.stock and dense.table.gain == "1+w" else gain
    elif plan.stock:
        tensors = _stock_norm(dense, "", norm, [(head + ".weight", head + ".bias")], tensors, basis.width)
    return tensors


def stock_block(dense: DenseModel, plan: Plan, index: int, tensors: Tensors) -> Tensors:
    """A sliced block (names relative to it) as a stock class has it, with what its config insists on."""
    if plan.stock is None:
        return tensors
    prefix, width = f"{dense.table.layers}.{index}.", plan.site_widths[0]
    for norm in dict.fromkeys(sublayer.norm for sublayer in dense.table.sublayers if sublayer.norm):
        readers = [(s.weight(n), s.bias(n)) for s in dense.table.sublayers if s.norm == norm for n in s.readers]
        tensors = _stock_norm(dense, prefix, norm, readers, tensors, width)
    return tensors | {module + ".bias": torch.zeros(width) for module in plan.stock.zero_biases}


def _stock_norm(
    dense: DenseModel, prefix: str, norm: str, readers: list[tuple[str, str]], tensors: Tensors, width: int
) -> Tensors:
    """Add a stock norm that has nothing left to do, unless its readers have no bias for the folded shift.

    A stock LayerNorm over `width` numbers gives n with sum zero (`layer_norm_basis`); with a shift of 1 it gives n + 1.
    Readers whose rows sum to zero don't see the 1, and those whose rows sum to b add b.

    Args:
        dense: The model.
        prefix: Where names are relative to.
        norm: The norm.
        readers: Names of the weight and the bias of each reader behind it.
        tensors: The folded weights.
        width: Of the stream.
    """
    carried = [bias for _, bias in readers if bias in tensors and not dense.keeps_bias(prefix + bias, stock=True)]
    result = {name: tensor for name, tensor in tensors.items() if name not in carried}
    for weight, bias in readers if carried else ():
        if weight in tensors:
            result[weight] = carry(tensors[weight], tensors[bias] if bias in carried else None)
    unit = torch.zeros if dense.table.gain == "1+w" else torch.ones
    kinds = {".weight": unit, ".bias": torch.ones if carried else torch.zeros}
    return result | {norm + k: make(width) for k, make in kinds.items() if prefix + norm + k in dense.shapes}
