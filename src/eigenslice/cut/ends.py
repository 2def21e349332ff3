"""The parts of a result around its blocks: embeddings, norms, head, and what a stock config insists on."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum, kept_basis, layer_norm_basis, tied_basis
from eigenslice.cut.blocks import Kept, SiteBasis
from eigenslice.model.dense import DenseModel, NamedTensors, Tensors
from eigenslice.model.folding import carry
from eigenslice.plan.plan import Plan


@dataclass(frozen=True)
class GlobalBasis:
    """One basis for all sites, and the final norm's gain where the embeddings stay tied."""

    site: SiteBasis
    tied_gain: Tensor | None


@dataclass(frozen=True)
class GlobalCut:
    """A plan with one basis for all sites.

    Attributes:
        plan: The plan.
        basis: The basis.
        kept: Neurons and heads that are kept in each block of the result.
    """

    plan: Plan
    basis: GlobalBasis
    kept: list[Kept]


def global_basis(dense: DenseModel, plan: Plan, spectrum: Spectrum) -> GlobalBasis:
    """The kept basis for a plan's form."""
    width = plan.site_widths[0]
    if plan.tied:
        basis = kept_basis(spectrum, width, constant=dense.layer_norm)
        matrix, gain = tied_basis(basis, dense.final_gain())
        return GlobalBasis(SiteBasis(matrix), gain)
    return GlobalBasis(site_basis(dense, spectrum, width, stock=plan.stock is not None), None)


def site_basis(dense: DenseModel, spectrum: Spectrum, width: int, *, stock: bool = False) -> SiteBasis:
    """The kept basis of a site whose norm is a stock class's, or the custom one's."""
    if (stock and dense.layer_norm) or dense.carries_shifts:
        return SiteBasis(layer_norm_basis(spectrum, width))
    return SiteBasis(kept_basis(spectrum, width))


def block_names(dense: DenseModel, index: int, tensors: NamedTensors, width: int) -> NamedTensors:
    """A block's tensors (out x in) as its modules hold them, under their names in the model."""
    return ((f"{dense.table.layers}.{index}.{name}", t) for name, t in dense.as_modules(tensors, width))


def slice_embeddings(
    dense: DenseModel, plan: Plan, basis: SiteBasis, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Weights of the token embedding and of positions, in a dtype."""
    token = dense.table.embeddings[0]
    for name, rows in dense.embeddings(centre=not plan.tied).items():
        scale = 1.0
        if plan.stock and dense.table.width_scales_embedding and name == token + ".weight":
            scale = 1 / basis.scale  # the class now multiplies by another width's root
        yield name, rows.map(lambda chunk, scale=scale: scale * basis.embed(chunk), dtype)
    if plan.tied and dense.layer_norm:
        # The constant vector in the basis: the direction that a LayerNorm's mean subtraction removes
        yield token + ".center", basis.matrix.sum(0) / dense.width**0.5


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
        plan: The plan of the result.
        basis: The basis of the site before the head.
        tied_gain: Gain of the final norm, in the basis; None if the head isn't tied.
        dtype: The dtype of an untied head.
        reading: What an untied head reads from the normalized stream, (D, width); None is Q / c.
    """
    rows, bias = dense.lm_head()
    head, norm = dense.table.lm_head, dense.table.final_norm
    if tied_gain is not None:
        scaled = plan.stock is not None and dense.table.width_scales_embedding
        gain = tied_gain / (basis.scale if scaled else basis.scale**2)
        yield norm + ".weight", gain - 1 if plan.stock and dense.table.gain == "1+w" else gain
        if bias is not None:
            yield head + ".bias", bias
        return
    matrix = basis.reading if reading is None else reading
    names = head + ".weight", head + ".bias"
    carried = plan.stock is not None and bias is not None and not dense.keeps_bias(names[1], stock=True)
    weight = rows.map(lambda chunk: chunk @ matrix, torch.float64 if carried else dtype)
    tensors = {names[0]: weight} | ({} if bias is None else {names[1]: bias})
    if plan.stock:
        tensors = _stock_norm(dense, "", norm, [names], tensors, basis.width)
    yield from tensors.items()


def stock_block(dense: DenseModel, plan: Plan, index: int, tensors: NamedTensors) -> NamedTensors:
    """A sliced block (names relative to it) as a stock class has it, with what its config insists on."""
    if plan.stock is None:
        yield from tensors
        return
    prefix, width = f"{dense.table.layers}.{index}.", plan.site_widths[0]
    if not dense.reader_bias:  # no norm has a shift that readers without bias would have to be given
        yield from tensors
        tensors = ()
    block = dict(tensors)
    for norm in dict.fromkeys(sublayer.norm for sublayer in dense.table.sublayers if sublayer.norm):
        readers = [(s.weight(n), s.bias(n)) for s in dense.table.sublayers if s.norm == norm for n in s.readers]
        block = _stock_norm(dense, prefix, norm, readers, block, width)
    yield from block.items()
    for module in plan.stock.zero_biases:
        yield module + ".bias", torch.zeros(width)


def _stock_norm(
    dense: DenseModel, prefix: str, norm: str, readers: list[tuple[str, str]], tensors: Tensors, width: int
) -> Tensors:
    """Add a stock norm that has nothing left to do, unless its readers have no bias for the folded shift.

    A stock LayerNorm over `width` numbers gives n with sum zero (`layer_norm_basis`); with a shift of 1 it gives n + 1.
    Readers whose rows sum to zero don't see the 1, and those whose rows sum to b add b.

    Args:
        dense: The model.
        prefix: The prefix that names are relative to.
        norm: The norm.
        readers: Names of the weight and the bias of each reader behind it.
        tensors: The folded weights.
        width: The width of the stream.
    """
    carried = [bias for _, bias in readers if bias in tensors and not dense.keeps_bias(prefix + bias, stock=True)]
    result = {name: tensor for name, tensor in tensors.items() if name not in carried}
    for weight, bias in readers if carried else ():
        if weight in tensors:
            result[weight] = carry(tensors[weight], tensors[bias] if bias in carried else None)
    unit = torch.zeros if dense.table.gain == "1+w" else torch.ones
    kinds = {".weight": unit, ".bias": torch.ones if carried else torch.zeros}
    return result | {norm + k: make(width) for k, make in kinds.items() if prefix + norm + k in dense.shapes}
