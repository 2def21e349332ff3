"""Wanda-sp: Wanda (arXiv 2306.11695) for whole channels, as FLAP's authors compare with it (arXiv 2312.11983).

The score of an input channel j of o_proj or down_proj is the mean of |W_ij| times the norm of x_j over the calibration
tokens; a head's score is the sum over its channels. Nothing makes up for the removed channels. All blocks are pruned at
the same ratio, each on the inputs that the pruned blocks before it give.
"""

from typing import Any

import torch
from torch import Tensor

from baselines import check_llama_like, shared_copy
from eigenslice.data.batches import Batch
from rivals.parts import head_columns, keep_heads, keep_neurons
from rivals.sizes import losses
from rivals.stream import Moments, Stream


@torch.no_grad()
def prune(model: Any, batches: list[Batch], most: int, heads: bool) -> Any:
    """Prune neurons, and key/value heads if `heads`.

    Raises:
        EigensliceError: the model isn't Llama-like, or can't be made so small.
    """
    check_llama_like(model)
    smaller = shared_copy(model)
    lost = losses(model, most, heads)
    stream = Stream(smaller, batches)
    for number, block in enumerate(smaller.model.layers):
        attention, mlp, (gone_heads, gone_neurons) = block.self_attn, block.mlp, lost[number]
        of_heads, of_neurons = Moments(attention.o_proj), Moments(mlp.down_proj)
        # Both layers are scored in one pass, before either is pruned
        stream.look(number, block, {attention.o_proj: of_heads.add, mlp.down_proj: of_neurons.add})
        if gone_heads:
            scores = importance(attention.o_proj.weight, of_heads).view(-1, head_columns(attention)).sum(1)
            keep_heads(attention, scores.topk(len(scores) - gone_heads).indices.sort().values)
        if gone_neurons:
            scores = importance(mlp.down_proj.weight, of_neurons)
            keep_neurons(mlp, scores.topk(len(scores) - gone_neurons).indices.sort().values)
        stream.advance(number, block)
    return smaller


def importance(weight: Tensor, moments: Moments) -> Tensor:
    """Mean of |W_ij| over rows, times the norm of x_j, (I,)."""
    return weight.double().abs().mean(0) * moments.second.sqrt()
