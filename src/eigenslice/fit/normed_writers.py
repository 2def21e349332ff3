"""Regressions for writers whose output is normed before it is added to the stream.

The stream gains g * RMSN(W a). With r the root mean square of the dense model's W a, the norm divides the sliced
model's by about the same number. Then the gain is linear in W, and W can be fitted like any writer. The target is r / g
times the missing part of the stream, so W repairs the error before it, too.

A norm of fixed size can't repair everything. Where g is small, a repair needs a large output, which the norm takes from
all other coordinates. So each coordinate's target is a mean of the repair and of the dense model's own output. A ridge
regression of the output, with the loss |s * (output - own)|^2 for the repair and DAMPING * mean(s^2) *
|output - own|^2 for the change, gives the weights of this mean.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size, normalize
from eigenslice.algebra.refit import InputsOutputs
from eigenslice.arch import Sublayer
from eigenslice.cut.blocks import SiteBasis
from eigenslice.fit.reader_step import Fits, FittedWriters, fit_neuron_readers
from eigenslice.fit.sliced_block import SlicedBlock
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.stream.walk import Activations, Site

DAMPING = 0.01
"""Cost of a change of the norm's output, as a share of the mean cost of an error in the stream."""
SMALLEST_GAIN = 1e-3
"""Least gain that errors are weighted by, as a share of the gains' root mean square."""


@dataclass(frozen=True)
class NormedWriter:
    """A writer before a post norm, beside the dense model's.

    Attributes:
        gain: The norm's gain g, (D,).
        basis: The basis that the norm's output is added to.
        eps: The norm's epsilon.
        unnormed: The dense model's W a, (B, T, D) of each batch. None takes the input of the last post norm that the
            dense stream has passed.
    """

    gain: Tensor
    basis: SiteBasis
    eps: float
    unnormed: OffloadedTensors | None = None

    @property
    def scale(self) -> Tensor:
        """Weight of an error in each of the writer's outputs, (D,): the size of g, but not zero."""
        size = self.gain.square().mean().sqrt()
        return self.gain.abs().clamp_min(torch.where(size > 0, SMALLEST_GAIN * size, torch.ones_like(size)))

    def before_gap(self, activations: list[Activations], copies: OffloadedTensors) -> "NormedWriter":
        """Return the writer with copies of the dense model's W a, which later post norms don't replace."""
        for batch in activations:
            copies.append(batch.unnormed[batch.number])
        return replace(self, unnormed=copies)

    def own(self, batch: Activations) -> Tensor:
        """Return the dense model's W a for a batch, (tokens, D)."""
        unnormed = batch.unnormed if self.unnormed is None else self.unnormed
        return batch.rows(unnormed[batch.number])

    def weight(self, batch: Activations) -> Tensor:
        """Return the weight of each token, (tokens, 1): both norms, this one and the next one, divide by a size."""
        return inverse_size(self.own(batch), self.eps) * inverse_size(batch.rows(batch.hidden), self.eps)

    def outputs(self, batch: Activations, missing: Tensor) -> Tensor:
        """Return the target of the writer's outputs, times `scale` and the token's weight, (tokens, D).

        Args:
            batch: The batch, with the dense stream behind the norm.
            missing: Part of the sliced stream that the norm's output has to add, (tokens, width).
        """
        own = self.own(batch)
        own = own * inverse_size(own, self.eps)
        change = self._repair(missing - self.basis.embed(own * self.gain.to(own.dtype)))
        return (own + change) * self.scale.to(own.dtype) * inverse_size(batch.rows(batch.hidden), self.eps)

    def change(self, batch: Activations, missing: Tensor) -> Tensor:
        """Return how much more than the dense writer gives is the target, as `outputs`.

        Args:
            batch: The batch, with the dense stream behind the norm.
            missing: Part of the sliced stream that the dense writer doesn't add, (tokens, width).
        """
        size = inverse_size(batch.rows(batch.hidden), self.eps)
        return self._repair(missing) * self.scale.to(missing.dtype) * size

    def added(self, batch: Activations, more: Tensor) -> Tensor:
        """Return how much more the norm gives, (B, T, D), if the dense writer gives more, (B, T, D)."""
        unnormed = batch.unnormed if self.unnormed is None else self.unnormed
        own = unnormed[batch.number]
        return (normalize(own + more, self.eps) - normalize(own, self.eps)) * self.gain.to(own.dtype)

    def _repair(self, error: Tensor) -> Tensor:
        """Return the change of the normed output, without the gain, for an error in the sliced stream."""
        gain = self.gain.to(error.dtype)
        if self.basis.rotated:
            error = error @ self.basis.matrix.T.to(error.dtype) / self.basis.scale
        return error * gain / (gain.square() + DAMPING * self.scale.square().mean().to(error.dtype))


def fit_normed_writer(block: SlicedBlock, site: Site, before: int, normed: NormedWriter, fits: Fits) -> None:
    """Fit the writer before a post norm, then the projection behind the norm, if there is one; pass the stream on.

    Args:
        block: The block with the writer.
        site: The site behind the norm.
        before: Number of the site before the writer, in its block.
        normed: The writer, beside the dense model's.
        fits: What all fits share.
    """
    (sublayer,) = fits.run.dense.anatomy.sites[before]
    weight, bias = sublayer.weight(sublayer.neuron_writer), block.weights.get(sublayer.bias(sublayer.neuron_writer))
    scale = normed.scale[:, None]

    def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
        outputs = normed.outputs(batch, batch.rows(block.missing(before, number, batch)))
        if bias is not None:
            outputs = outputs - (normed.scale * bias).to(outputs.dtype) * normed.weight(batch)
        return batch.rows(block.inputs[0][number]) * normed.weight(batch), outputs

    kind = "neurons" if sublayer.can_cut_neurons else "write"
    fitted = fits.fit(kind, site, scale * block.weights[weight], inputs_outputs)
    block.put({weight: fitted / scale})
    if fits.reader_stride and sublayer.can_cut_neurons:
        columns = scale * block.weights[weight]
        written = FittedWriters(fitted, inputs_outputs, columns, normed.weight)
        fit_neuron_readers(block, site, before, sublayer, written, fits)
    if block.basis.rotated:
        _fit_projection(block, site, before, sublayer, fits)
    writer, norm = (block.layer.get_submodule(name) for name in (sublayer.neuron_writer, sublayer.post_norm))
    for number, inputs in enumerate(block.inputs[0]):
        block.pass_on(before, number, norm(writer(inputs)))
    for kept in (block.inputs[0], normed.unnormed):
        if kept is not None:
            kept.clear()


def _fit_projection(block: SlicedBlock, site: Site, before: int, sublayer: Sublayer, fits: Fits) -> None:
    """Fit the matrix behind a post norm whose writer is fitted; for the arguments, see `fit_normed_writer`."""
    writer = block.layer.get_submodule(sublayer.neuron_writer)

    def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
        inputs = batch.rows(normalize(writer(block.inputs[0][number]), site.eps))
        size = inverse_size(batch.rows(batch.hidden), site.eps)
        return inputs * size, batch.rows(block.missing(before, number, batch)) * size

    fitted = fits.fit("write", site, block.weights[sublayer.projection], inputs_outputs)
    block.put({sublayer.projection: fitted})
