"""Regressions for writers whose output is normed before it is added to the stream.

The stream gains g * RMSN(W a). With r the root mean square of the dense model's W a, the norm divides the sliced
model's by about the same number. Then the gain is linear in W, and W can be fitted like any writer. The target is r / g
times the missing part of the stream, so W repairs the error before it, too.

A norm of fixed size can't repair everything. Where g is small, a repair needs a large output, which the norm takes from
all other coordinates. So each coordinate's target is a mean of the repair and of the dense model's own output. A ridge
regression of the output, with the loss |s * (output - own)|^2 for the repair and DAMPING * mean(s^2) *
|output - own|^2 for the change, gives the weights of this mean.
"""

from dataclasses import dataclass

from torch import Tensor

from eigenslice.algebra.covariance import inverse_size
from eigenslice.cut.blocks import SiteBasis
from eigenslice.stream.walk import Activations

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
    """

    gain: Tensor
    basis: SiteBasis
    eps: float

    @property
    def scale(self) -> Tensor:
        """Weight of an error in each of the writer's outputs, (D,): the size of g, but not zero."""
        return self.gain.abs().clamp_min(SMALLEST_GAIN * self.gain.square().mean().sqrt())

    def weight(self, batch: Activations) -> Tensor:
        """Return the weight of each token, (tokens, 1): both norms, this one and the next one, divide by a size."""
        unnormed = batch.rows(batch.unnormed[batch.number])
        return inverse_size(unnormed, self.eps) * inverse_size(batch.rows(batch.hidden), self.eps)

    def outputs(self, batch: Activations, missing: Tensor) -> Tensor:
        """Return the target of the writer's outputs, times `scale` and the token's weight, (tokens, D).

        Args:
            batch: The batch, with the dense stream behind the norm.
            missing: Part of the sliced stream that the norm's output has to add, (tokens, width).
        """
        unnormed = batch.rows(batch.unnormed[batch.number])
        own = unnormed * inverse_size(unnormed, self.eps)
        gain, scale = self.gain.to(own.dtype), self.scale.to(own.dtype)
        error = missing - self.basis.embed(own * gain)
        if self.basis.rotated:
            error = error @ self.basis.matrix.T.to(own.dtype) / self.basis.scale
        change = error * gain / (gain.square() + DAMPING * scale.square().mean())
        return (own + change) * scale * inverse_size(batch.rows(batch.hidden), self.eps)
