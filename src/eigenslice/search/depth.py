"""Which blocks a model can best do without.

Leaving out a block is the coarsest cut, but stock configs can hold it, and the writer before the block makes up for
much of it when it is refitted to the stream behind the block. What is left is measured: the loss of the whole model
when one block alone is gone, refitted on some sequences and measured on others. (ShortGPT, arXiv 2403.03853, looks at
how much a block changes the stream, and refits nothing.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size
from eigenslice.algebra.refit import DEFAULT_RIDGE, NormalEquations
from eigenslice.arch import Sublayer
from eigenslice.data.batches import HELD_OUT_GROUP, Batch, share_batches
from eigenslice.measure.divergence import dense_head, divergences
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.ranks import ALONE, Ranks
from eigenslice.runtime.run_state import RunState
from eigenslice.search.parted import held_out_first, run_parted
from eigenslice.stream.walk import Activations, Site, Stream

STAGE = "depth"


@dataclass(frozen=True)
class _Gap:
    """A block that is left out.

    Attributes:
        block: Its number.
        inputs: For each batch, what the writer before it reads, (B, T, n); nothing where that can't be refitted.
        skipped: For each batch, the stream before it, (B, T, D).
    """

    block: int
    inputs: OffloadedTensors
    skipped: OffloadedTensors


def missed_least(
    dense: DenseModel,
    count: int,
    batches: list[Batch],
    stream: Stream,
    progress: Callable[[int], None] = lambda block: None,
    state: RunState | None = None,
    ranks: Ranks = ALONE,
) -> dict[int, float]:
    """The blocks that are missed least, and KL(dense || dense without that block) of each, in nats per token.

    One pass: behind each block one more stream parts from the dense one, without what the block would have added. To
    keep it short, only `count` of them run on to the head: those that are nearest to the dense stream where they part
    from it. The first block is never left out.

    Args:
        dense: The model; its blocks are alike.
        count: How many blocks to measure.
        batches: From `holdout.trial_batches`; of all ranks.
        stream: The dense model's.
        progress: Called with the number of each block.
        state: Where to keep the result. An interrupted measurement begins again.
        ranks: Who share the sequences.

    Returns:
        Losses by block, the lowest first.
    """
    finished = state.result(STAGE) if state else None
    if finished:
        return {int(block): loss for block, loss in finished[1]["kl"]}
    last = dense.table.sites(dense.config)[-1]
    observed = [sublayer for sublayer in last if len(sublayer.writers) == 1 and not sublayer.stacked]
    gap: _Gap | None = None
    read: dict[int, list[Tensor]] = {}  # by the last site's writers, for each batch
    parted: dict[int, tuple[float, OffloadedTensors]] = {}  # distance at the block's end, and held-out streams

    def observe(block: int, sublayer: Sublayer, a: Activations, inputs: Mapping[str, Any]) -> None:
        read.setdefault(a.number, []).append(inputs[sublayer.writers[0]])

    for site in stream.walk(share_batches(held_out_first(batches), ranks), observe, observed):
        progress(site.block)
        if site.index == 0:
            if gap:
                parted[gap.block] = _bridge(dense, gap, site, stream.offload.tensors(), ranks)
                for far in sorted(parted, key=lambda block: parted[block][0])[count:]:
                    parted.pop(far)[1].clear()
                gap.inputs.clear()
                gap.skipped.clear()
            gap = None
            if site.block:
                gap = _Gap(site.block, stream.offload.tensors(), stream.offload.tensors())
                for a in site.activations:
                    gap.skipped.append(a.hidden)
                    if observed:
                        gap.inputs.append(torch.cat(read.pop(a.number), dim=-1))
        if site.layer is None:
            break
        for _, streams in parted.values():
            run_parted(site, streams)
    head = dense_head(dense)
    losses = divergences(head, site, [streams for _, streams in parted.values()], [head] * len(parted), ranks)
    found = sorted(zip(parted, losses, strict=True), key=lambda pair: pair[1])
    if state:
        state.finish(STAGE, {}, {"kl": found})
    return dict(found)


def _bridge(
    dense: DenseModel, gap: _Gap, site: Site, streams: OffloadedTensors, ranks: Ranks
) -> tuple[float, OffloadedTensors]:
    """Refit the writer before a gap to the stream behind it, by ridge regression on tokens that aren't held out.

    Args:
        dense: The model.
        gap: The block that is left out.
        site: The first one behind it.
        streams: Takes the held-out streams.
        ranks: Who share the sequences.

    Returns:
        How far the held-out streams are from the dense ones behind the block, as a share of their energy; and they.
    """
    change = None
    if len(gap.inputs):
        inputs = gap.inputs[0].shape[-1]
        sums = NormalEquations.zeros(inputs, dense.width, dense.device)
        for number, a in enumerate(site.activations):
            if a.group != HELD_OUT_GROUP:
                hidden = a.hidden
                weight = inverse_size(a.rows(hidden), site.eps)
                sums.add(a.rows(gap.inputs[number]) * weight, a.rows(hidden - gap.skipped[number]) * weight)
        sums.add_up(ranks.sum)
        base = torch.zeros(dense.width, inputs, dtype=torch.float64, device=dense.device)
        change = ranks.decide(sums.solve(base, DEFAULT_RIDGE))
    far = torch.zeros(2, dtype=torch.float64, device=dense.device)
    for number, a in enumerate(site.activations):
        if a.group == HELD_OUT_GROUP:
            hidden, without = a.hidden, gap.skipped[number]
            if change is not None:
                without = without + gap.inputs[number] @ change.T.to(without.dtype)
            streams.append(without)
            wrong, size = (a.rows(x).square().sum(-1) for x in (hidden - without, hidden))
            far += torch.stack([(wrong / (size + dense.width * site.eps)).sum().double(), far.new_tensor(len(size))])
    wrong, tokens = ranks.decide(ranks.sum(far)).tolist()
    return wrong / tokens, streams
