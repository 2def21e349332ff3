"""The parts of a result around its blocks: embeddings, norms, head, and tensors that a stock config requires."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum, kept_basis, layer_norm_basis, tied_basis
from eigenslice.arch import Table
from eigenslice.cut.blocks import Kept, SiteBasis, identity_basis
from eigenslice.model.anatomy import Anatomy
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
    if not plan.rotated:
        return GlobalBasis(identity_basis(width, dense.device), dense.final_gain() if plan.tied else None)
    if plan.tied:
        basis = kept_basis(spectrum, width, constant=dense.anatomy.layer_norm)
        matrix, gain = tied_basis(basis, dense.final_gain())
        return GlobalBasis(SiteBasis(matrix), gain)
    return GlobalBasis(site_basis(dense.anatomy, spectrum, width, stock=plan.stock is not None), None)


def site_basis(anatomy: Anatomy, spectrum: Spectrum, width: int, *, stock: bool = False) -> SiteBasis:
    """Return the kept basis of a site with a norm of a stock class or of the custom class."""
    if (stock and anatomy.layer_norm) or anatomy.carries_shifts:
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
        if plan.stock and name in dense.anatomy.fixed_positions:
            continue  # the class computes them
        scale = 1.0
        if plan.stock and dense.table.width_scales_embedding and name == token + ".weight":
            scale = 1 / basis.scale  # the class now multiplies by another width's root
        yield name, rows.map(lambda chunk, scale=scale: scale * basis.embed(chunk), dtype)
    if plan.tied and dense.anatomy.layer_norm and not plan.stock:
        # The constant vector in the basis: the direction that a LayerNorm's mean subtraction removes
        yield token + ".center", basis.matrix.sum(0) / dense.anatomy.width**0.5


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
        reading: The untied head's map from the normalized stream to dense coordinates, (D, width); None is Q / c.
    """
    rows, bias = dense.lm_head()
    head, norm = dense.table.lm_head, dense.table.final_norm
    if tied_gain is not None:
        scaled = plan.stock is not None and dense.table.width_scales_embedding
        gain = tied_gain / (basis.scale if scaled else basis.scale**2)
        if not plan.stock or norm + ".weight" in dense.anatomy.shapes:
            yield norm + ".weight", gain - 1 if plan.stock and dense.table.gain == "1+w" else gain
        if plan.stock and dense.anatomy.layer_norm:  # not rotated: the stock norm adds the shift itself
            bias, shift = dense.raw(head + ".bias"), dense.raw(norm + ".bias")
            yield from () if shift is None else ((norm + ".bias", shift),)
        if bias is not None:
            yield head + ".bias", bias
        return
    names = head + ".weight", head + ".bias"
    carried = plan.stock is not None and bias is not None and not dense.anatomy.keeps_bias(names[1], stock=True)
    computed = torch.float64 if carried else torch.float32
    matrix = (basis.reading if reading is None else reading).to(computed)
    weight = rows.map(lambda chunk: chunk.to(computed) @ matrix, computed if carried else dtype)
    tensors = {names[0]: weight} | ({} if bias is None else {names[1]: bias})
    if plan.stock:
        tensors = _stock_norm(dense.anatomy, "", norm, [names], tensors, basis.width)
    yield from tensors.items()


def stock_block(anatomy: Anatomy, plan: Plan, index: int, tensors: NamedTensors) -> NamedTensors:
    """A sliced block (names relative to it) as a stock class holds it, with the tensors that its config requires.

    `index` is its number in the result.
    """
    if plan.stock is None:
        yield from tensors
        return
    tensors = _stock_gains(anatomy.table, tensors)
    prefix, width = f"{anatomy.table.layers}.{plan.kept_blocks[index]}.", plan.site_widths[0]
    if not anatomy.reader_bias:  # no norm has a shift that readers without bias would have to be given
        yield from tensors
        tensors = ()
    block = dict(tensors)
    for norm in dict.fromkeys(sublayer.norm for sublayer in anatomy.table.sublayers if sublayer.norm):
        readers = [(s.weight(n), s.bias(n)) for s in anatomy.table.sublayers if s.norm == norm for n in s.readers]
        block = _stock_norm(anatomy, prefix, norm, readers, block, width)
    yield from block.items()
    for module in plan.stock.zero_biases:
        yield module + ".bias", torch.zeros(width)


def _stock_gains(table: Table, tensors: NamedTensors) -> NamedTensors:
    """Yield a block's tensors, with the gains of post norms as a stock norm's weights."""
    gains = {sublayer.post_gain for sublayer in table.sublayers if sublayer.post_norm}
    for name, tensor in tensors:
        yield name, tensor - 1 if name in gains and table.gain == "1+w" else tensor


def _stock_norm(
    anatomy: Anatomy, prefix: str, norm: str, readers: list[tuple[str, str]], tensors: Tensors, width: int
) -> Tensors:
    """Add a stock norm that has nothing left to do, unless its readers have no bias for the folded shift.

    A stock LayerNorm over `width` numbers gives n with sum zero (`layer_norm_basis`); with a shift of 1 it gives n + 1.
    A reader whose rows sum to zero doesn't see the 1. A reader whose rows sum to b adds b.

    Args:
        anatomy: The dense model.
        prefix: The prefix that names are relative to.
        norm: The norm.
        readers: Names of the weight and the bias of each reader behind it.
        tensors: The folded weights.
        width: The width of the stream.
    """
    carried = [bias for _, bias in readers if bias in tensors and not anatomy.keeps_bias(prefix + bias, stock=True)]
    result = {name: tensor for name, tensor in tensors.items() if name not in carried}
    for weight, bias in readers if carried else ():
        if weight in tensors:
            result[weight] = carry(tensors[weight], tensors[bias] if bias in carried else None)
    unit = torch.zeros if anatomy.table.gain == "1+w" else torch.ones
    kinds = {".weight": unit, ".bias": torch.ones if carried else torch.zeros}
    return result | {norm + k: make(width) for k, make in kinds.items() if prefix + norm + k in anatomy.shapes}
