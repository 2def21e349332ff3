"""Hidden states of the calibration tokens, carried from block to block."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from eigenslice.data.batches import Batch

Add = Callable[[Tensor], None]
"""Takes inputs of a linear layer, (tokens, features), of tokens that count."""


class Stop(Exception):  # noqa: N818
    """Ends a forward pass early."""


class Stream:
    """All calibration tokens in front of a block, as the blocks before it leave them."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        """Embed the tokens of the batches, with the arguments that the model gives to each block."""
        self._states: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._arguments: list[list[dict[str, Any]]] = []
        for batch in batches:
            ids = batch.input_ids.to(model.device)
            given = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
            mask = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
            calls: list[tuple[Tensor, dict[str, Any]]] = []
            with _skipped(model.model.layers, calls):
                model.model(input_ids=ids, attention_mask=given, position_ids=positions, use_cache=False)
            self._states.append(calls[0][0])
            self._masks.append(mask)
            self._arguments.append([arguments for _, arguments in calls])

    def advance(self, number: int, block: Any, watched: dict[Any, Add] | None = None) -> None:
        """Take all tokens through a block.

        Args:
            number: The block's number in the dense model.
            block: The block, dense or pruned.
            watched: Linear layers of the block, and the functions that get their inputs.
        """
        for batch in range(len(self._states)):
            self._states[batch] = self._run(batch, number, block, watched or {})

    def look(self, number: int, block: Any, watched: dict[Any, Add]) -> None:
        """As `advance`, and the tokens stay in front of the block. The last watched layer has to run last."""
        *_, (last, add) = watched.items()

        def stop(rows: Tensor) -> None:
            add(rows)
            raise Stop

        for batch in range(len(self._states)):
            with suppress(Stop):
                self._run(batch, number, block, watched | {last: stop})

    def _run(self, batch: int, number: int, block: Any, watched: dict[Any, Add]) -> Tensor:
        mask = self._masks[batch]
        with ExitStack() as hooks:
            for linear, add in watched.items():
                hook = linear.register_forward_pre_hook(lambda _, inputs, add=add: add(inputs[0][mask]))
                hooks.callback(hook.remove)
            output = block(self._states[batch], **self._arguments[batch][number])
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def _skipped(layers: Any, calls: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Let blocks give their input back, and note their arguments."""

    def skip(hidden: Tensor, **arguments: Any) -> Tensor:
        calls.append((hidden, arguments))
        return hidden

    for layer in layers:
        layer.forward = skip
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Gram:
    """Sum of x x^T over the inputs x of a linear layer, (features, features) in float64."""

    def __init__(self, linear: Any) -> None:
        size, device = linear.in_features, linear.weight.device
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add inputs (tokens, features)."""
        rows = rows.double()
        self.sum.addmm_(rows.T, rows)


class Moments:
    """Sums of x and of x^2 over the inputs x of a linear layer, (features,) in float64.

    Attributes:
        count: Number of inputs.
        first: Sum of x.
        second: Sum of x^2.
    """

    def __init__(self, linear: Any) -> None:
        size, device = linear.in_features, linear.weight.device
        self.count = 0
        self.first, self.second = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, rows: Tensor) -> None:
        """Add inputs (tokens, features)."""
        rows = rows.double()
        self.count += len(rows)
        self.first += rows.sum(0)
        self.second += rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean of x."""
        return self.first / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of x, divided by count - 1."""
        return (self.second - self.first.square() / self.count).clamp_min(0) / (self.count - 1)
