"""Plans tried on held-out calibration tokens: each is fitted on a few sequences and measured on others."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum
from eigenslice.algebra.covariance import normalize
from eigenslice.assembly import global_basis, slice_embeddings, slice_head
from eigenslice.dense import DenseModel
from eigenslice.measuring import Measurement
from eigenslice.plan import Plan
from eigenslice.refitting import SlicedTwin
from eigenslice.stream import RANDOM_GROUP, Batch, Site, Stream

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
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda block: None,
) -> list[float]:
    """KL(dense || sliced) of each plan on held-out tokens, in nats per token.

    All plans run beside one pass of the dense model.

    Args:
        dense: The model.
        plans: Plans with a global basis.
        spectrum: Principal components of the stream.
        measurement: What the first pass found.
        batches: From `trial_batches`.
        dtype: Of the forward pass.
        progress: Called with the number of each block.
    """
    bases = [global_basis(dense, plan, spectrum) for plan in plans]
    twins = [
        SlicedTwin(
            dense,
            plan,
            basis.site,
            measurement.kept(plan.neurons),
            dtype,
            lambda block, tensors: None,
            frozenset([TRIAL]),
        )
        for plan, basis in zip(plans, bases, strict=True)
    ]
    for site in Stream(dense, dense.device, dtype).walk(batches):
        progress(site.block)
        for twin in twins:
            twin.step(site)
    heads = []
    for plan, basis, twin in zip(plans, bases, twins, strict=True):
        custom = replace(plan, stock=None)  # whatever it is saved as, this is what it computes
        tensors = slice_head(dense, custom, basis.site, basis.tied_gain, twin.reading)
        if plan.tied:
            table = dense.table
            embedding = slice_embeddings(dense, custom, basis.site)[table.embeddings[0] + ".weight"]
            weight = embedding * tensors[table.final_norm + ".weight"]
        else:
            weight = tensors[dense.table.head + ".weight"]
        heads.append((weight.float(), tensors.get(dense.table.head + ".bias")))
    return _divergences(dense, site, twins, heads)


def _divergences(
    dense: DenseModel, site: Site, twins: list[SlicedTwin], heads: list[tuple[Tensor, Tensor | None]]
) -> list[float]:
    """KL of the twins at the site before the head, over the sequences of the trial group."""
    weight, bias = dense.head()
    weight = weight.float()
    scale = dense.table.logit_scale(dense.config) if dense.table.logit_scale else 1.0
    totals, tokens = [0.0] * len(twins), 0
    for number, a in enumerate(site.activations):
        if a.group != TRIAL:
            continue
        rows = a.rows(normalize(a.hidden, site.eps))
        tokens += len(rows)
        sliced = [a.rows(normalize(twin.streams[number], site.eps)) for twin in twins]
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            expected = _log_probabilities(rows[part], weight, bias, scale)
            for index, (head, shift) in enumerate(heads):
                actual = _log_probabilities(sliced[index][part], head, shift, scale)
                totals[index] += float((expected.exp() * (expected - actual)).sum(-1).double().sum())
    return [total / tokens for total in totals]


def _log_probabilities(rows: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = rows @ weight.T
    return (scale * (logits if bias is None else logits + bias.float())).log_softmax(-1)
