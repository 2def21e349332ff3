"""SlimGPT (arXiv 2412.18110): structured optimal brain surgeon, batched and greedy, deeper blocks pruned more.

A column p of a writer W, with the Gram matrix H of its inputs, costs |W_p|^2 / [H^-1]_pp. The other columns make up
for it by W -= W_p / [H^-1]_pp H^-1_p (equations 2 and 3). Columns are removed in groups, and the costs are computed
anew after each group. For heads the costs of columns come from Cholesky factors of the head's part of H^-1, which
count the columns of the head that go before. H is measured behind the blocks and heads that are pruned already.

Block i of n is pruned at the ratio r_0 + (r_last - r_0) log(i + 1) / log(n) (equation 6). The paper's code has
r_0 = r_last / 4 at 20 % (`--min_sparsity 0.0625 --max_sparsity 0.25`), which is kept for all sizes here.
"""

import math
from typing import Any

import torch
from torch import Tensor

from baselines import check_llama_like, shared_copy
from eigenslice.data.batches import Batch
from rivals.parts import head_columns, keep_heads, keep_neurons
from rivals.sizes import losses
from rivals.stream import Gram, Stream

FIRST = 0.25
"""Ratio of the first block over that of the last one."""
SMALLEST, LARGEST = 8, 1024
"""Columns of a group. The first group has (target - 512) / 2, each further one half of what is over 512 there."""
OVER = 512
DAMPING = 1e-8
"""Share of H's mean diagonal that is added, so that dead columns can be inverted; the paper's code adds none."""


@torch.no_grad()
def prune(model: Any, batches: list[Batch], most: int, heads: bool) -> Any:
    """Prune neurons, and key/value heads if `heads`, each block on the inputs that the pruned blocks give.

    Raises:
        EigensliceError: the model isn't Llama-like, or can't be made so small.
    """
    check_llama_like(model)
    smaller = shared_copy(model)
    lost = losses(model, most, heads, incremental(len(smaller.model.layers)))
    stream = Stream(smaller, batches)
    for number, block in enumerate(smaller.model.layers):
        gone_heads, gone_neurons = lost[number]
        if gone_heads:
            unit = head_columns(block.self_attn)
            columns, writer = eliminate(*_system(stream, number, block, block.self_attn.o_proj), gone_heads, unit)
            keep_heads(block.self_attn, columns[::unit] // unit, writer)
        if gone_neurons:
            columns, writer = eliminate(*_system(stream, number, block, block.mlp.down_proj), gone_neurons)
            keep_neurons(block.mlp, columns, writer)
        stream.advance(number, block)
    return smaller


def _system(stream: Stream, number: int, block: Any, linear: Any) -> tuple[Tensor, Tensor]:
    gram = Gram(linear)
    stream.look(number, block, {linear: gram.add})
    return linear.weight, gram.sum


def incremental(blocks: int) -> list[float]:
    """Ratio of each block over that of the last one."""
    if blocks == 1:
        return [1.0]
    return [FIRST + (1 - FIRST) * math.log(i + 1) / math.log(blocks) for i in range(blocks)]


def eliminate(weight: Tensor, gram: Tensor, gone: int, unit: int = 1) -> tuple[Tensor, Tensor]:
    """Remove columns of a writer; the others make up for them.

    Args:
        weight: The writer, (D, I).
        gram: Gram matrix of its inputs, (I, I).
        gone: Number of units to remove.
        unit: Neighbouring columns that go together.

    Returns:
        Numbers of the kept columns, in order (n,), and the writer's columns for them (D, n) in float64.
    """
    writer, gram = weight.double(), gram.double()
    damping = DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(gram + damping)
    columns = torch.arange(len(gram), device=gram.device)
    group = (gone - OVER) // 2
    while gone:
        costs = (writer.square().sum(0) / _conditional(inverse, unit)).view(-1, unit).sum(1)
        count = 1 if unit > 1 else min(gone, LARGEST, max(group, SMALLEST))
        leaving = costs.topk(count, largest=False).indices
        mask = torch.zeros_like(costs, dtype=torch.bool).index_fill(0, leaving, True).repeat_interleave(unit)
        # All columns of the group in turn, by one Schur complement
        step = torch.linalg.solve(inverse[mask][:, mask], inverse[mask][:, ~mask])
        writer = writer[:, ~mask] - writer[:, mask] @ step
        inverse = inverse[~mask][:, ~mask] - inverse[~mask][:, mask] @ step
        columns = columns[~mask]
        gone, group = gone - count, (group - OVER) // 2
    return columns, writer


def _conditional(inverse: Tensor, unit: int) -> Tensor:
    """[H^-1]_pp of each column after the columns before it in its unit are gone, (I,)."""
    if unit == 1:
        return inverse.diagonal()
    starts = range(0, len(inverse), unit)
    blocks = torch.stack([inverse[start : start + unit, start : start + unit] for start in starts])
    return torch.linalg.cholesky(blocks).diagonal(dim1=-2, dim2=-1).square().flatten()
