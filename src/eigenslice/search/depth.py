"""A search for the blocks that a model misses least.

Leaving out a block is the coarsest cut, but stock configs can hold it. The writer before the block makes up for much of
it, when it is refitted to the stream behind the block. The remaining loss of the whole model is measured for each block
alone, refitted on some sequences and measured on other sequences. ShortGPT (arXiv 2403.03853) takes the change of the
stream by a block instead, and refits nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size
from eigenslice.algebra.refit import DEFAULT_RIDGE, NormalEquations
from eigenslice.arch import Sublayer
from eigenslice.cut.blocks import identity_basis
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.fit.normed_writers import NormedWriter
from eigenslice.fit.ridges import solve_shared
from eigenslice.measure.divergence import divergences, make_heads
from eigenslice.measure.importance import post_gain
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.precision import products
from eigenslice.search.parted import held_out_first, run_parted
from eigenslice.stream.run import Run
from eigenslice.stream.walk import Activations, Site

DEPTH_STAGE = "depth"


@dataclass(frozen=True)
class _Gap:
    """A block that is left out.

    Attributes:
        block: Number of the block.
        inputs: For each batch, the inputs of the writer before the block, (B, T, n); empty if it can't be refitted.
        skipped: For each batch, the stream before the block, (B, T, D).
        normed: The writer before the block, if a norm is behind it.
    """

    block: int
    inputs: OffloadedTensors
    skipped: OffloadedTensors
    normed: NormedWriter | None

    def clear(self) -> None:
        """Remove all tensors."""
        for tensors in (self.inputs, self.skipped, self.normed and self.normed.unnormed):
            if tensors is not None:
                tensors.clear()


def missed_least(run: Run, count: int, batches: list[Batch]) -> dict[int, float]:
    """Find the least missed blocks, and KL(dense || dense without the block) of each, in nats per token.

    All streams run in one pass. Behind each block one more stream parts from the dense stream, without the block's
    output. To keep the pass short, only `count` streams run on to the head: the nearest ones to the dense stream where
    they part. The first block is never left out.

    Args:
        run: The run. An interrupted measurement begins again.
        count: Number of blocks to measure.
        batches: Sequences from `holdout.trial_batches`, of all ranks.

    Returns:
        Losses by block, the lowest first.
    """
    dense = run.dense
    finished = run.state.result(DEPTH_STAGE)
    if finished:
        return {int(block): loss for block, loss in finished[1]["kl"]}
    last = dense.anatomy.sites[-1]
    observed = [s for s in last if len(s.writers) + len(s.normed_writers) == 1 and not s.stacked]
    gap: _Gap | None = None
    normed: NormedWriter | None = None  # the last writer that the dense stream passed, if a norm is behind it
    read: dict[int, list[Tensor]] = {}  # by the last site's writers, for each batch
    parted: dict[int, tuple[float, OffloadedTensors]] = {}  # distance at the block's end, and held-out streams

    def observe(block: int, sublayer: Sublayer, batch: Activations, inputs: Mapping[str, Any]) -> None:
        read.setdefault(batch.number, []).append(inputs[sublayer.neuron_writer])

    report = run.report(DEPTH_STAGE, sum(batch.tokens for batch in batches))
    for site in run.walk(held_out_first(batches), observe, observed, unnormed=True):
        report(site.block)
        if site.index == 0:
            if gap:
                parted[gap.block] = _bridge(run, gap, site)
                for far in sorted(parted, key=lambda block: parted[block][0])[count:]:
                    parted.pop(far)[1].clear()
                gap.clear()
            gap = None
            if site.block:
                if normed:
                    normed = normed.before_gap(site.activations, run.offload.tensors())
                gap = _Gap(site.block, run.offload.tensors(), run.offload.tensors(), normed)
                for batch in site.activations:
                    gap.skipped.append(batch.hidden)
                    if observed:
                        gap.inputs.append(torch.cat(read.pop(batch.number), dim=-1))
        if site.layer is None:
            break
        if site.index == len(dense.anatomy.sites) - 1:
            normed = _normed_writer(run, site, last[0])
        for _, streams in parted.values():
            run_parted(site, streams)
    head, _ = make_heads(dense)
    losses = divergences(head, site, [streams for _, streams in parted.values()], [head] * len(parted), run.ranks)
    ranked = sorted(zip(parted, losses, strict=True), key=lambda pair: pair[1])
    run.state.finish(DEPTH_STAGE, {}, {"kl": ranked})
    return dict(ranked)


def _normed_writer(run: Run, site: Site, sublayer: Sublayer) -> NormedWriter | None:
    """Return the writer of a block's last site beside the dense model's, None if no norm is behind the writer."""
    if not sublayer.post_norm:
        return None
    gain, scale = post_gain(sublayer, site), site.layer.scale_behind(site.index)
    basis = identity_basis(run.dense.anatomy.width, run.dense.device)
    return NormedWriter(gain if scale is None else gain * scale, basis, site.eps)


def _bridge(run: Run, gap: _Gap, site: Site) -> tuple[float, OffloadedTensors]:
    """Refit the writer before a gap to the stream behind it, by ridge regression on tokens that aren't held out.

    Args:
        run: The run.
        gap: The block that is left out.
        site: The first site behind the block.

    Returns:
        The distance of the held-out streams from the dense streams behind the block, as a share of the dense energy;
        and the held-out streams.
    """
    width, ranks, streams = run.dense.anatomy.width, run.ranks, run.offload.tensors()
    change = _refitted(run, gap, site) if len(gap.inputs) else None
    far = torch.zeros(2, dtype=torch.float64, device=run.dense.device)
    for number, batch in enumerate(site.activations):
        if batch.group == HELD_OUT_GROUP:
            hidden, without = batch.hidden, gap.skipped[number]
            if change is not None:
                more = gap.inputs[number] @ change.T.to(without.dtype)
                without = without + (gap.normed.added(batch, more) if gap.normed else more)
            streams.append(without)
            wrong, size = (batch.rows(x).square().sum(-1) for x in (hidden - without, hidden))
            far += torch.stack([(wrong / (size + width * site.eps)).sum().double(), far.new_tensor(len(size))])
    wrong, tokens = ranks.decide(ranks.sum(far)).tolist()
    return wrong / tokens, streams


def _refitted(run: Run, gap: _Gap, site: Site) -> Tensor:
    """Return the change of the writer before a gap, (D, n), that makes up for the gap; see `_bridge`."""
    inputs, width, device = gap.inputs[0].shape[-1], run.dense.anatomy.width, run.dense.device
    sums = NormalEquations.zeros(inputs, width, device)
    for number, batch in enumerate(site.activations):
        if batch.group != HELD_OUT_GROUP:
            hidden = batch.hidden
            missing = batch.rows(hidden - gap.skipped[number])
            if gap.normed:
                weight, outputs = gap.normed.weight(batch), gap.normed.change(batch, missing)
            else:
                weight = inverse_size(batch.rows(hidden), site.eps)
                outputs = missing * weight
            with products(run.precision.gram):
                sums.add(batch.rows(gap.inputs[number]) * weight, outputs)
    sums.add_up(run.ranks.sum)
    base = torch.zeros(width, inputs, dtype=torch.float64, device=device)
    change = solve_shared(sums, base, DEFAULT_RIDGE, run.ranks, run.precision).weights
    return change / gap.normed.scale[:, None] if gap.normed else change
