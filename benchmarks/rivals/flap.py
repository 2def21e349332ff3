"""FLAP (arXiv 2312.11983): channels that fluctuate little go, and a bias takes the place of their mean.

The score of an input channel j of o_proj or down_proj is its variance over the calibration tokens times |W_j|^2 (WIFV).
Scores are standardized within each layer. A head's score is the mean over its channels. Heads and neurons of all
blocks are then ranked together, and the lowest go until the size is reached (structure AL-AM). W_j mean(x_j) of the
removed channels is added to the layer's bias. As in the paper's code, and unlike in its equation, the scores of
attention channels are squared before they are standardized.

The biases count as parameters where the dense model has none. One unit of each layer stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines import check_llama_like, shared_copy, stored, unreachable
from eigenslice.data.batches import Batch
from rivals.parts import columns_of, head_columns, keep_heads, keep_neurons
from rivals.sizes import units_of
from rivals.stream import Moments, Stream


@dataclass(frozen=True)
class Layer:
    """A writer whose units can go.

    Attributes:
        scores: Score of each unit, (n,).
        unit: Parameters of a unit.
        bias: Parameters that are added with the first unit that goes.
    """

    scores: Tensor
    unit: int
    bias: int


@torch.no_grad()
def prune(model: Any, batches: list[Batch], most: int, heads: bool) -> Any:
    """Prune neurons, and key/value heads if `heads`; one pass of the dense model.

    Raises:
        EigensliceError: the model isn't Llama-like, or can't be made so small.
    """
    check_llama_like(model)
    smaller = shared_copy(model)
    stream = Stream(smaller, batches)
    blocks = list(smaller.model.layers)
    moments: list[tuple[Moments, Moments]] = []
    for number, block in enumerate(blocks):
        out, down = block.self_attn.o_proj, block.mlp.down_proj
        of_block = Moments(out), Moments(down)
        stream.advance(number, block, {out: of_block[0].add, down: of_block[1].add})
        moments.append(of_block)
    layers = [layer for block, pair in zip(blocks, moments, strict=True) for layer in _layers(block, *pair)]
    gone = lowest(layers, stored(model) - most, [2 * i + 1 for i in range(len(blocks))] if not heads else None)
    for number, (block, (of_heads, of_neurons)) in enumerate(zip(blocks, moments, strict=True)):
        attention, mlp, (gone_heads, gone_neurons) = block.self_attn, block.mlp, gone[2 * number : 2 * number + 2]
        if len(gone_heads):
            bias = _mean_output(attention.o_proj, of_heads, columns_of(gone_heads, head_columns(attention)))
            keep_heads(attention, _others(gone_heads, len(layers[2 * number].scores)), bias=bias)
        if len(gone_neurons):
            bias = _mean_output(mlp.down_proj, of_neurons, gone_neurons)
            keep_neurons(mlp, _others(gone_neurons, len(layers[2 * number + 1].scores)), bias=bias)
    return smaller


def _layers(block: Any, of_heads: Moments, of_neurons: Moments) -> Iterator[Layer]:
    """The two writers of a block."""
    units, out, down = units_of(block), block.self_attn.o_proj, block.mlp.down_proj
    channels = standardized(fluctuation(of_heads.variance, out.weight).square())
    scores = channels.view(-1, head_columns(block.self_attn)).mean(1)
    yield Layer(scores, units.head_size, 0 if out.bias is not None else out.out_features)
    scores = standardized(fluctuation(of_neurons.variance, down.weight))
    yield Layer(scores, units.neuron_size, 0 if down.bias is not None else down.out_features)


def fluctuation(variance: Tensor, weight: Tensor) -> Tensor:
    """WIFV: variance of each channel (I,) times the squared norm of its column in weight (D, I)."""
    return variance * weight.double().square().sum(0)


def standardized(scores: Tensor) -> Tensor:
    """Scores with mean 0 and standard deviation 1."""
    return (scores - scores.mean()) / scores.std()


def lowest(layers: list[Layer], goal: int, only: list[int] | None = None) -> list[Tensor]:
    """Units of each layer to remove, the lowest scores of all first, until so many parameters are gone.

    Args:
        layers: The layers.
        goal: Parameters to remove.
        only: Layers that may lose units; None is all.

    Raises:
        OptionsError: one unit is left in each layer.
    """
    numbers = range(len(layers)) if only is None else only
    best = [int(layer.scores.argmax()) for layer in layers]
    ranked = sorted(
        (score, number, unit)
        for number in numbers
        for unit, score in enumerate(layers[number].scores.tolist())
        if unit != best[number]
    )
    gone: list[list[int]] = [[] for _ in layers]
    saved = 0
    for _, number, unit in ranked:
        if saved >= goal:
            break
        saved += layers[number].unit - (0 if gone[number] else layers[number].bias)
        gone[number].append(unit)
    if saved < goal:
        raise unreachable(goal, saved, "each layer keeps one unit")
    return [torch.tensor(sorted(units), dtype=torch.long, device=layers[0].scores.device) for units in gone]


def _mean_output(linear: Any, moments: Moments, columns: Tensor) -> Tensor:
    """What the columns add to the output in the mean, (D,)."""
    return linear.weight[:, columns].double() @ moments.mean[columns]


def _others(gone: Tensor, count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool, device=gone.device).index_fill(0, gone, False).nonzero()[:, 0]
