"""The step of an MLP's readers once its writer is fitted, and how much of the step is taken."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.arch import Sublayer
from eigenslice.fit.neuron_readers import Errors, Readers, fit_readers, take_largest_step
from eigenslice.fit.ridges import InputsOutputsOf, RidgeFits
from eigenslice.fit.sliced_block import SlicedBlock
from eigenslice.model.dense import Tensors
from eigenslice.runtime.precision import products
from eigenslice.stream.run import Run
from eigenslice.stream.walk import Activations, Site


@dataclass(frozen=True)
class Fits:
    """What the fits of one sliced model share.

    Attributes:
        run: The run.
        ridges: The ridge regressions.
        reader_stride: Distance of the tokens that the curvature of MLP neurons' readers is computed on; 0 leaves these
            readers as they are.
    """

    run: Run
    ridges: RidgeFits
    reader_stride: int

    def fit(self, kind: str, site: Site, base: Tensor, inputs_outputs: InputsOutputsOf) -> Tensor:
        """Solve a ridge regression over the batches at a site, whose number says which group is held out.

        For the other arguments and the result, see `RidgeFits.fit`.
        """
        number = site.block * len(self.run.dense.anatomy.sites) + site.index
        return self.ridges.fit(kind, number, site.activations, base, inputs_outputs)


@dataclass(frozen=True)
class FittedWriters:
    """The writers of a site, as a regression has fitted them.

    Attributes:
        weights: Weights of all writers beside each other, and the bias, (m, n).
        inputs_outputs: Function that gives the regression's inputs, (tokens, n), and outputs, (tokens, m), weighted.
        columns: Columns of the MLP's neurons, (m, neurons).
        weight: Function that gives the weight of each token of a batch, (tokens, 1).
    """

    weights: Tensor
    inputs_outputs: InputsOutputsOf
    columns: Tensor
    weight: Callable[[Activations], Tensor]


def fit_neuron_readers(
    block: SlicedBlock, site: Site, before: int, sublayer: Sublayer, writers: FittedWriters, fits: Fits
) -> None:
    """Fit an MLP's readers to the error that its fitted writer leaves, and run the sublayers again.

    Args:
        block: The block with the MLP.
        site: The site behind the MLP.
        before: Number of the site before the MLP, in its block.
        sublayer: The MLP.
        writers: The fitted writers.
        fits: What all fits share.
    """

    def left() -> Iterator[tuple[int, Activations, Tensor]]:
        for number, batch in enumerate(site.activations):
            if batch.group in fits.ridges.groups:
                inputs, missing = writers.inputs_outputs(number, batch)
                yield number, batch, missing - inputs @ writers.weights.T.to(inputs.dtype)

    def batches() -> Iterator[Errors]:
        for number, batch, missing in left():
            normalized = block.normalized(before, number)
            yield Errors(batch, normalized, block.kwargs(batch), missing, writers.weight(batch))

    def error() -> float:
        squares = torch.zeros(1, dtype=torch.float64, device=writers.weights.device)
        with products(fits.run.precision.neurons):  # as the error was measured that it is compared with
            for _, _, missing in left():
                squares += missing.square().sum()
        return float(fits.run.ranks.decide(fits.run.ranks.sum(squares)))

    def put(changed: Tensors) -> None:
        block.put(changed)
        block.run(site.activations, before)

    names = tuple(name for name in sublayer.readers if sublayer.weight(name) in block.weights)
    readers = Readers(block.layer, before, sublayer, names)
    with products(fits.run.precision.neurons):
        step, most = fit_readers(readers, batches(), writers.columns, fits.run, fits.reader_stride)
    changes = {sublayer.weight(name): change for name, change in step.items()}
    weights = {name: block.weights[name] for name in changes}
    take_largest_step(weights, changes, put, lambda: error() <= most)
