"""The writers of a mixture's experts, fitted so that the kept neurons make up for the cut ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size
from eigenslice.algebra.refit import InputsOutputs
from eigenslice.arch import Sublayer
from eigenslice.cut.blocks import Kept
from eigenslice.model.dense import Tensors
from eigenslice.stream.experts import WriterInputs
from eigenslice.stream.walk import Activations, Site

InputsOutputsOf = Callable[[int, Activations], InputsOutputs]
"""Takes a batch and its number, and gives the inputs (T, n) and outputs (T, m) of a regression."""


def fit_experts(
    site: Site,
    sublayer: Sublayer,
    writers: Tensors,
    kept: Kept,
    inputs: WriterInputs,
    regression: Callable[[Tensor, InputsOutputsOf], Tensor],
) -> Tensors:
    """Let the writer of each expert make up for the neurons that it loses.

    Each writer is fitted to the expert's output with all neurons, on the expert's own tokens. Unlike other writers,
    experts don't repair the error before them, because the choice of an expert isn't smooth.

    Args:
        site: The site before the experts.
        sublayer: The experts.
        writers: Weights of their writers with all neurons, by name.
        kept: Neurons that each expert keeps, and kept neurons of shared experts.
        inputs: Inputs of the writers.
        regression: Regression towards known weights, (m, n), on tokens.

    Returns:
        Weights of the writers, by name.
    """
    assert kept.neurons is not None

    def fit(writer: Tensor, neurons: Tensor, expert: int | None) -> Tensor:
        def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
            rows, stream = inputs.read(number, batch, expert)
            rows = rows * inverse_size(stream, site.eps)
            return rows[:, neurons], rows @ writer.T.to(rows.dtype)

        return regression(writer[:, neurons], inputs_outputs)

    name, shared = sublayer.weight(sublayer.neuron_writer), sublayer.shared_writer
    pairs = zip(writers[name], kept.neurons, strict=True)
    fitted = {name: torch.stack([fit(writer, neurons, expert) for expert, (writer, neurons) in enumerate(pairs)])}
    if shared and kept.shared_neurons is not None:
        fitted[sublayer.weight(shared)] = fit(writers[sublayer.weight(shared)], kept.shared_neurons, None)
    return fitted
