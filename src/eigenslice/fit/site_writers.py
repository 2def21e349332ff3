"""The fit of the writers between two sites, so that the sliced stream becomes the dense stream in the basis."""

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size
from eigenslice.algebra.refit import InputsOutputs
from eigenslice.fit.reader_step import Fits, FittedWriters, fit_neuron_readers
from eigenslice.fit.sliced_block import SlicedBlock
from eigenslice.model.dense import Tensors
from eigenslice.stream.walk import Activations, Site


def fit_site_writers(block: SlicedBlock, site: Site, before: int, fits: Fits) -> None:
    """Fit the writers before a site in one regression, and let the stream pass them.

    Args:
        block: The block with the writers.
        site: The site behind the writers.
        before: Number of the site before the writers, in their block.
        fits: What all fits share.
    """
    sites, writers = fits.run.dense.anatomy.sites, block.writers(before)
    biases = [name for name in _names(writers, block.weights) if name.endswith(".bias")]
    parts = [block.weights[module + ".weight"] for module in writers]
    if biases:
        parts.append(torch.stack([block.weights[name] for name in biases]).sum(0)[:, None])

    def size(batch: Activations) -> Tensor:
        return inverse_size(batch.rows(batch.hidden), site.eps)

    def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
        inputs, weight = _stacked(block, number, bias=bool(biases)), size(batch)
        return batch.rows(inputs) * weight, batch.rows(block.missing(before, number, batch)) * weight

    kind = "neurons" if any(sublayer.can_cut_neurons for sublayer in sites[before]) else "write"
    fitted = fits.fit(kind, site, torch.cat(parts, dim=1), inputs_outputs)
    pieces = fitted.split([part.shape[1] for part in parts], dim=1)
    block.keep({module + ".weight": piece for module, piece in zip(writers, pieces, strict=False)})
    if biases:
        # Together they are the fitted bias; the others stay as they are
        block.keep({biases[0]: block.weights[biases[0]] + pieces[-1][:, 0] - parts[-1][:, 0]})
    if fits.reader_stride:
        for sublayer in sites[before]:
            if sublayer.can_cut_neurons and sublayer.neuron_writer in writers:
                columns = block.weights[sublayer.weight(sublayer.neuron_writer)]
                written = FittedWriters(fitted, inputs_outputs, columns, size)
                fit_neuron_readers(block, site, before, sublayer, written, fits)
    for number in range(len(block.streams)):
        inputs = _stacked(block, number, bias=bool(biases))
        block.pass_on(before, number, inputs @ fitted.T.to(inputs.dtype))
    for inputs in block.inputs:
        inputs.clear()


def _stacked(block: SlicedBlock, number: int, *, bias: bool) -> Tensor:
    """Inputs of all writers of the site beside each other, and a one where there is a bias."""
    inputs = [of_writer[number] for of_writer in block.inputs]
    ones = [torch.ones_like(inputs[0][..., :1])] if bias else []
    return torch.cat([*inputs, *ones], dim=-1)


def _names(modules: list[str], tensors: Tensors) -> list[str]:
    """Names of the parameters of some linear layers."""
    return [name for module in modules for name in (module + ".weight", module + ".bias") if name in tensors]
