"""The experts of a mixture: the tokens of each expert, and the input of its writer.

An expert is an MLP of its own: its neurons are chosen, and its writer is fitted, on the tokens that are routed to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.arch import Sublayer, Table
from eigenslice.runtime.offload import Offload
from eigenslice.stream.walk import Activations


@dataclass(frozen=True)
class Routing:
    """The experts that get the tokens of a batch; only tokens that count, as in `Activations.rows`.

    Attributes:
        index: Numbers of the experts, (tokens, k).
        weights: Factors of these experts' outputs, (tokens, k).
    """

    index: Tensor
    weights: Tensor

    @classmethod
    def of(cls, batch: Activations, arguments: tuple[Tensor, ...]) -> tuple[Tensor, "Routing"]:
        """Return the experts' input, (tokens, width), and the routing, from the arguments of transformers' call."""
        hidden, index, weights = (x.reshape(-1, x.shape[-1]) for x in arguments)
        if batch.mask is not None:
            hidden, index, weights = (x[batch.mask.flatten()] for x in (hidden, index, weights))
        return hidden, cls(index, weights)

    def to(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return numbers of the tokens that an expert is given, (n,), and the factors of its output, (n, 1)."""
        tokens, place = torch.where(self.index == expert)
        return tokens, self.weights[tokens, place, None].float()


@dataclass(frozen=True)
class Experts:
    """A layer's experts with the weights that it has at the moment.

    Attributes:
        module: transformers' module.
        reader: Gate and up projection, (experts, out, width).
        bias: Bias of the reader, (experts, out), or None.
    """

    module: Any
    reader: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, table: Table, sublayer: Sublayer, layer: Any) -> "Experts":
        """Return the experts of a decoder layer."""
        reader = sublayer.stacked[0]
        name, module = sublayer.weight(reader), layer.get_submodule(sublayer.experts)
        bias = getattr(module, sublayer.bias(reader).rpartition(".")[2], None)
        return cls(module, table.transpose({name: layer.get_parameter(name)})[name], bias)

    def inner(self, expert: int, hidden: Tensor) -> Tensor:
        """Return the input of an expert's writer, (n, neurons), for tokens (n, width); in float32 or more."""
        gate_up = torch.nn.functional.linear(
            hidden, self.reader[expert], None if self.bias is None else self.bias[expert]
        )
        inner = self.module._apply_gate(gate_up)
        return inner.to(torch.promote_types(inner.dtype, torch.float32))


class WriterInputs:
    """The inputs of the writers of a layer's experts and shared experts, batch by batch."""

    def __init__(self, experts: Experts, offload: Offload) -> None:
        """Begin without a batch; offload: where the inputs live."""
        self._experts = experts
        self._hidden, self._shared = offload.tensors(), offload.tensors()
        self._routings: list[Routing] = []

    def append(self, batch: Activations, arguments: tuple[Tensor, ...], shared: Tensor | None) -> None:
        """Add a batch.

        Args:
            batch: The batch.
            arguments: The arguments of transformers' call of the experts.
            shared: Input of the shared experts' writer, (B, T, n), if there are any.
        """
        hidden, routing = Routing.of(batch, arguments)
        self._hidden.append(hidden)
        self._routings.append(routing)
        if shared is not None:
            self._shared.append(shared)

    def read(self, number: int, batch: Activations, expert: int | None) -> tuple[Tensor, Tensor]:
        """Return the input of an expert's writer for a batch, times the router's weight.

        Args:
            number: Number of the batch.
            batch: The batch.
            expert: Number of the expert; None for the shared experts.

        Returns:
            The inputs, (n, neurons), and the dense stream at these tokens, (n, D).
        """
        if expert is None:
            return batch.rows(self._shared[number]), batch.rows(batch.hidden)
        tokens, weights = self._routings[number].to(expert)
        return self._experts.inner(expert, self._hidden[number][tokens]) * weights, batch.rows(batch.hidden)[tokens]

    def clear(self) -> None:
        """Forget all of it."""
        self._hidden.clear()
        self._shared.clear()
        self._routings = []
