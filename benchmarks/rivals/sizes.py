"""How many units each block loses, so that a model stores as many parameters as asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baselines import stored, unreachable
from rivals.parts import key_value_heads

STEPS = 60
"""Halvings of an interval of ratios."""


@dataclass(frozen=True)
class Units:
    """What a block can lose: MLP neurons, and key/value heads with their query heads.

    Attributes:
        neurons, heads: Numbers of units.
        neuron_size, head_size: Parameters of one.
    """

    neurons: int
    heads: int
    neuron_size: int
    head_size: int


def units_of(block: Any) -> Units:
    """The units of a block. All of an MLP's parameters but down_proj's bias belong to neurons, and so in attention."""
    mlp, attention = block.mlp, block.self_attn
    mlp_size = sum(p.numel() for linear in (mlp.gate_proj, mlp.up_proj) for p in linear.parameters())
    inner = (attention.q_proj, attention.k_proj, attention.v_proj)
    attention_size = sum(p.numel() for linear in inner for p in linear.parameters())
    neurons, heads = mlp.down_proj.in_features, key_value_heads(attention)
    return Units(
        neurons,
        heads,
        (mlp_size + mlp.down_proj.weight.numel()) // neurons,
        (attention_size + attention.o_proj.weight.numel()) // heads,
    )


def ratio_for(size: Callable[[float], float], most: int, highest: float = 1.0) -> float:
    """The smallest ratio at which a size, which falls with the ratio, is at most `most`.

    Raises:
        OptionsError: the size is larger at the highest ratio.
    """
    if size(0) <= most:
        return 0.0
    if size(highest) > most:
        raise unreachable(most, int(size(highest)), "each block keeps one neuron")
    low, high = 0.0, highest
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) <= most else (middle, high)
    return high


def losses(model: Any, most: int, heads: bool, shares: list[float] | None = None) -> list[tuple[int, int]]:
    """Key/value heads and neurons that each block loses.

    Heads and neurons of a block are pruned at the same ratio. As heads are few, their number is rounded, and the
    neurons make up for the difference, at one ratio for all blocks.

    Args:
        model: The dense model.
        most: The most parameters to store.
        heads: Prune heads, too.
        shares: Ratio of each block over that of the block that loses most; None is the same ratio for all.

    Raises:
        OptionsError: the size can't be reached.
    """
    units = [units_of(block) for block in model.model.layers]
    shares = shares or [1.0] * len(units)
    dense, highest = stored(model), 1 / min(share for share in shares if share > 0)

    def prunable(unit: Units) -> int:
        return unit.neurons * unit.neuron_size + heads * unit.heads * unit.head_size

    def smooth(ratio: float) -> float:
        return dense - sum(min(1.0, ratio * s) * prunable(unit) for s, unit in zip(shares, units, strict=True))

    ratio = ratio_for(smooth, most, highest)
    gone = [_part(ratio * s, unit.heads) if heads else 0 for s, unit in zip(shares, units, strict=True)]
    left = dense - sum(count * unit.head_size for count, unit in zip(gone, units, strict=True))

    def neurons(ratio: float) -> list[int]:
        return [_part(ratio * share, unit.neurons) for share, unit in zip(shares, units, strict=True)]

    def exact(ratio: float) -> float:
        return left - sum(count * unit.neuron_size for count, unit in zip(neurons(ratio), units, strict=True))

    return list(zip(gone, neurons(ratio_for(exact, most, highest)), strict=True))


def _part(ratio: float, count: int) -> int:
    """So many of the units; one stays."""
    return min(math.floor(ratio * count + 0.5), count - 1)
