"""Sums over the tokens of a mixture's experts: how much each neuron, and each expert, adds to the stream."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.stream.experts import Experts, Routing


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens of each expert, float64.

    Attributes:
        neurons: Energies of the neurons, a_i^2 / size, (experts, neurons); a_i is an output times the router's weight,
            and size the mean square of the stream.
        outputs: Norms of the experts' outputs, times the router's weight, over the root of size, (experts,).
    """

    neurons: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, experts: Experts, hidden: Tensor, routing: Routing, size: Tensor) -> "ExpertSums":
        """Return the sums over a batch.

        Args:
            experts: The experts.
            hidden: Their input, see `Routing.of`.
            routing: The tokens of each expert.
            size: Mean square of the stream at each token, (tokens, 1).
        """
        neurons, outputs = [], []
        for expert in range(len(experts.reader)):
            tokens, rows, weights = routing.to(expert, hidden)
            inner = experts.inner(expert, rows)
            neurons.append(((inner * weights).square() / size[tokens]).sum(0))
            written = experts.output(expert, inner) * weights
            outputs.append((written.norm(dim=-1) / size[tokens, 0].sqrt()).sum())
        return cls(torch.stack(neurons).to(torch.float64), torch.stack(outputs).to(torch.float64))
