"""The experts of a mixture: the tokens of each expert, and the input of its writer.

An expert is an MLP of its own: its neurons are chosen, and its writer is fitted, on the tokens that are routed to it.
"""

from collections.abc import Mapping
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
    def of(cls, batch: Activations, arguments: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, "Routing"]:
        """Return the experts' input and the routing, from the arguments of transformers' call of the experts.

        Most types give tokens, numbers of experts, and weights. Llama 4 gives each expert all tokens, times the
        router's weight: zero for tokens of other experts.

        Returns:
            The input, (tokens, width), or (tokens, k, width) where experts get different inputs; and the routing.
        """
        if isinstance(arguments, Tensor):
            tokens = batch.hidden[..., 0].numel()
            routed = arguments.view(-1, tokens, arguments.shape[-1]).transpose(0, 1)  # (tokens, experts, width)
            given = routed.ne(0).any(-1)
            index = given.byte().topk(int(given.sum(-1).max()), -1).indices
            hidden = routed.gather(1, index[..., None].expand(-1, -1, routed.shape[-1]))
            weights = given.gather(1, index).to(hidden.dtype)
        else:
            hidden, index, weights = (x.reshape(-1, x.shape[-1]) for x in arguments)
        if batch.mask is not None:
            hidden, index, weights = (x[batch.mask.flatten()] for x in (hidden, index, weights))
        return hidden, cls(index, weights)

    def to(self, expert: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers of an expert's tokens, (n,), their input, (n, width), and the factors of outputs, (n, 1)."""
        tokens, place = torch.where(self.index == expert)
        rows = hidden[tokens, place] if hidden.dim() > self.index.dim() else hidden[tokens]
        return tokens, rows, self.weights[tokens, place, None].float()


@dataclass(frozen=True)
class Experts:
    """A layer's experts with the weights that it has at the moment.

    Attributes:
        module: transformers' module.
        reader: Gate and up projection, (experts, out, width).
        bias: Bias of the reader, (experts, out), or None.
        writer: Weight of the writer, (experts, width, neurons).
        writer_bias: Bias of the writer, (experts, width), or None.
    """

    module: Any
    reader: Tensor
    bias: Tensor | None
    writer: Tensor
    writer_bias: Tensor | None

    @classmethod
    def of(cls, table: Table, sublayer: Sublayer, layer: Any) -> "Experts":
        """Return the experts of a decoder layer."""
        module = layer.get_submodule(sublayer.experts)
        weights = table.transpose({name: layer.get_parameter(name) for name in sublayer.stacked})
        biases = (getattr(module, sublayer.bias(name).rpartition(".")[2], None) for name in sublayer.stacked)
        (reader, bias), (writer, writer_bias) = zip(weights.values(), biases, strict=True)
        return cls(module, reader, bias, writer, writer_bias)

    def inner(self, expert: int, hidden: Tensor) -> Tensor:
        """Return the input of an expert's writer, (n, neurons), for tokens (n, width); in float32 or more."""
        gate_up = torch.nn.functional.linear(
            hidden, self.reader[expert], None if self.bias is None else self.bias[expert]
        )
        if hasattr(self.module, "_apply_gate"):
            inner = self.module._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.module.act_fn(gate) * up
        return inner.to(torch.promote_types(inner.dtype, torch.float32))

    def output(self, expert: int, inner: Tensor) -> Tensor:
        """Return an expert's output, (n, width), from the input of its writer, (n, neurons)."""
        output = inner @ self.writer[expert].T.to(inner.dtype)
        return output if self.writer_bias is None else output + self.writer_bias[expert].to(inner.dtype)


class MixtureInputs:
    """The inputs of the writers of a layer's experts and shared experts, batch by batch.

    Attributes:
        sublayer: The mixture.
        experts: The experts, whose readers have their final weights.
    """

    def __init__(self, sublayer: Sublayer, experts: Experts, offload: Offload) -> None:
        """Begin without a batch; offload: where the inputs live."""
        self.sublayer, self.experts = sublayer, experts
        self._hidden, self._shared = offload.tensors(), offload.tensors()
        self._routings: list[Routing] = []

    def append(self, batch: Activations, inputs: Mapping[str, Any]) -> None:
        """Add a batch, with the inputs of `Sublayer.observed` modules by name."""
        hidden, routing = Routing.of(batch, inputs[self.sublayer.experts])
        self._hidden.append(hidden)
        self._routings.append(routing)
        if self.sublayer.shared_writer:
            self._shared.append(batch.rows(inputs[self.sublayer.shared_writer]))

    def read(self, number: int, expert: int | None) -> tuple[Tensor, Tensor]:
        """Return the tokens of an expert in a batch, and the input of its writer, times the router's weight.

        Args:
            number: Number of the batch.
            expert: Number of the expert; None for the shared experts.

        Returns:
            Numbers of the tokens, (n,), among the tokens that count, and the inputs, (n, neurons).
        """
        if expert is None:
            inputs = self._shared[number]
            return torch.arange(len(inputs), device=inputs.device), inputs
        tokens, hidden, weights = self._routings[number].to(expert, self._hidden[number])
        return tokens, self.experts.inner(expert, hidden) * weights

    def clear(self) -> None:
        """Forget all of it."""
        self._hidden.clear()
        self._shared.clear()
        self._routings = []
