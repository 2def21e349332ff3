"""Plans tried on held-out calibration tokens: each is fitted on a few sequences and measured on others."""

from collections.abc import Callable

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum
from eigenslice.algebra.covariance import normalize
from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.assembly import GlobalBasis, global_basis, slice_embeddings, slice_head
from eigenslice.dense import DenseModel
from eigenslice.measuring import Measurement
from eigenslice.plan import Plan
from eigenslice.ranks import ALONE, Ranks
from eigenslice.refitting import SlicedTwin
from eigenslice.resume import RunState
from eigenslice.stream import RANDOM_GROUP, STREAMS, Batch, Site, Stream, share_batches

FIT_TOKENS = 8_192
"""Tokens that a trial is fitted on: enough to tell plans apart, not enough to make the best of one."""
TRIAL_TOKENS = 4_096
"""Tokens that it is measured on."""
TRIAL = -1  # group of the sequences that nothing is fitted on
ROWS = 256  # tokens whose logits are held at once


def trial_batches(batches: list[Batch]) -> list[Batch]:
    """A few sequences to fit on and a few others to measure on, in equal shares of all groups.

    Sequences are taken in turns from the groups; every third one is held out. With a single sequence, that one
    serves for both.
    """
    queues: dict[int, list[Batch]] = {}
    for batch in batches:
        for row in range(batch.input_ids.shape[0]):
            mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1]
            one = Batch(batch.input_ids[row : row + 1], mask, batch.group)
            if one.tokens:  # not all of it is padding
                queues.setdefault(batch.group, []).append(one)
    chosen: list[Batch] = []
    room = {False: FIT_TOKENS, True: TRIAL_TOKENS}
    for turn in range(max(map(len, queues.values()))):
        for group, queue in queues.items():
            held = turn % 3 == 2 and group != RANDOM_GROUP
            if turn < len(queue) and room[held] > 0:
                one = queue[turn]
                room[held] -= one.tokens
                chosen.append(Batch(one.input_ids, one.attention_mask, TRIAL if held else one.group))
    if all(batch.group != TRIAL for batch in chosen):
        last = chosen[-1]
        fitted = chosen[:-1] if len(chosen) > 1 else chosen
        return [*fitted, Batch(last.input_ids, last.attention_mask, TRIAL)]
    return chosen


def try_plans(
    dense: DenseModel,
    plans: list[Plan],
    spectrum: Spectrum,
    measurement: Measurement,
    batches: list[Batch],
    stream: Stream,
    progress: Callable[[int], None] = lambda block: None,
    state: RunState | None = None,
    ranks: Ranks = ALONE,
    stage: str = "planning",
) -> list[float]:
    """KL(dense || sliced) of each plan on held-out tokens, in nats per token.

    All plans run beside one pass of the dense model.

    Args:
        dense: The model.
        plans: Plans with a global basis.
        spectrum: Principal components of the stream.
        measurement: What the first pass found.
        batches: From `trial_batches`; of all ranks.
        stream: The dense model's.
        progress: Called with the number of each block.
        state: Where to save what is found, and to go on from; None saves nothing.
        ranks: Who share the batches.
        stage: Name of this trial in the state.
    """
    finished = state.result(stage) if state else None
    if finished:
        return finished[1]["kl"]
    bases = [global_basis(dense, plan, spectrum) for plan in plans]
    groups = {batch.group for batch in batches} - {TRIAL}
    twins = [
        SlicedTwin(
            dense,
            plan,
            basis.site,
            measurement.kept(plan.neurons),
            stream.dtype,
            lambda block, tensors: None,
            groups=groups,
            ridge=DEFAULT_RIDGE,
            offload=stream.offload,
            ranks=ranks,
        )
        for plan, basis in zip(plans, bases, strict=True)
    ]
    position = state.position(stage) if state else None
    if position:
        for number, twin in enumerate(twins):
            twin.restore(position, f"plan-{number}", position.content[str(number)])
    for site in stream.walk(share_batches(batches, ranks), position=position, hold=True):
        progress(site.block)
        for twin in twins:
            if not site.resumed:
                twin.arrive(site)
        if state and site.index == 0 and site.block and not site.resumed:
            streams = {STREAMS: site.streams} | {f"plan-{n}": twin.streams for n, twin in enumerate(twins)}
            state.save(stage, site.block, streams, {}, {str(n): twin.content() for n, twin in enumerate(twins)})
        for twin in twins:
            twin.leave(site)
    heads = [_head(dense, plan, basis, twin) for plan, basis, twin in zip(plans, bases, twins, strict=True)]
    losses = _divergences(dense, site, twins, heads, ranks)
    if state:
        state.finish(stage, {}, {"kl": losses})
    return losses


def _head(dense: DenseModel, plan: Plan, basis: GlobalBasis, twin: SlicedTwin) -> tuple[Tensor, Tensor | None]:
    """A sliced model's head: its weight, with the final norm's gain in it, and its bias."""
    head, norm = dense.table.head, dense.table.final_norm
    tensors = dict(slice_head(dense, plan, basis.site, basis.tied_gain, torch.float32, twin.reading))
    if plan.tied:
        embedding = dict(slice_embeddings(dense, plan, basis.site, torch.float32))[
            dense.table.embeddings[0] + ".weight"
        ]
        return embedding * tensors[norm + ".weight"].float(), tensors.get(head + ".bias")
    return tensors[head + ".weight"], tensors.get(head + ".bias")


def _divergences(
    dense: DenseModel,
    site: Site,
    twins: list[SlicedTwin],
    heads: list[tuple[Tensor, Tensor | None]],
    ranks: Ranks,
) -> list[float]:
    """KL of the twins at the site before the head, over the sequences of the trial group."""
    rows_of_head, bias = dense.head()
    weight = rows_of_head.to(torch.float32)
    totals = torch.zeros(len(twins) + 1, dtype=torch.float64, device=dense.device)  # and the number of tokens
    for number, a in enumerate(site.activations):
        if a.group != TRIAL:
            continue
        rows = a.rows(normalize(a.hidden, site.eps))
        totals[-1] += len(rows)
        sliced = [a.rows(normalize(twin.streams[number], site.eps)) for twin in twins]
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            expected = _log_probabilities(rows[part], weight, bias)
            for index, (head, shift) in enumerate(heads):
                actual = _log_probabilities(sliced[index][part], head, shift)
                totals[index] += (expected.exp() * (expected - actual)).sum(-1).double().sum()
    *losses, tokens = ranks.decide(ranks.sum(totals)).tolist()
    return [loss / tokens for loss in losses]


def _log_probabilities(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = rows @ weight.T
    return (logits if bias is None else logits + bias.float()).log_softmax(-1)
