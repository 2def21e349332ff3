"""Different numbers of MLP neurons in different blocks, for results in the custom class.

Stock configs have one number for all blocks. But blocks aren't alike: one block may hardly miss half of its neurons,
and another block may miss a tenth. The loss is measured block by block. Neurons are cut and the writer is refitted on
some sequences. The loss of the whole model is measured on other sequences.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.cholesky import factor_in_place, solve_in_place
from eigenslice.algebra.covariance import add_gram, inverse_size
from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.measure.divergence import divergences, make_heads
from eigenslice.measure.importance import Measurement, added_weight, writer_weight
from eigenslice.model.dense import DenseModel
from eigenslice.plan.plan import FEWEST_NEURONS
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.precision import products
from eigenslice.search.parted import TOKENS, held_out_first, run_parted
from eigenslice.stream.run import Run
from eigenslice.stream.runner import captured_inputs
from eigenslice.stream.walk import Site

ALLOCATION_STAGE = "allocating"


@dataclass(frozen=True)
class BlockLosses:
    """Losses of the model when one block's MLP is cut.

    Attributes:
        kl: For each block, KL(dense || dense with only this block cut), in nats per token, (blocks,), float64.
        measured: Number of neurons that the block keeps for `kl`.
        error: For each block, the error of the MLP's output with the k most important neurons, for k from none to all,
            (blocks, neurons + 1), float64.
    """

    kl: Tensor
    measured: int
    error: Tensor

    def allocate(self, mean: int, step: int, kept: Sequence[int] | None = None) -> tuple[int, ...]:
        """Choose the number of neurons of each block so that the blocks together lose least.

        Two assumptions: a block's loss is proportional to the error of its MLP's output, and the blocks' losses add up.
        For a price per neuron, each block then chooses by itself. The budget decides the price.

        Args:
            mean: Average number of neurons that a block may keep.
            step: Divisor of all numbers of neurons, where not all are kept.
            kept: Numbers of the blocks that are kept; None is all.
        """
        rows = slice(None) if kept is None else list(kept)
        kl, error = self.kl[rows], self.error[rows]
        blocks, neurons = len(kl), error.shape[1] - 1
        least = max(step, -(-int(FEWEST_NEURONS * neurons) // step) * step)
        counts = torch.tensor([*range(least, neurons, step), neurons], device=error.device)
        scale = kl / error[:, self.measured].clamp_min(torch.finfo(torch.float64).tiny)
        losses = scale[:, None] * error[:, counts]
        budget = max(mean, least) * blocks
        low, high = 0.0, float(losses.max()) + 1.0  # no price: all are kept; the highest: the fewest
        for _ in range(100):
            price = (low + high) / 2
            chosen = (losses + price * counts).argmin(1)
            if int(counts[chosen].sum()) > budget:
                low = price
            else:
                high = price
        chosen = (losses + high * counts).argmin(1)
        while True:  # a step of all blocks that the price treats alike may leave some of the budget over
            room = budget - int(counts[chosen].sum())
            more = (chosen + 1).clamp_max(len(counts) - 1)
            gain = (losses.gather(1, chosen[:, None]) - losses.gather(1, more[:, None]))[:, 0]
            grows = (counts[more] - counts[chosen] <= room) & (more > chosen)
            if not bool(grows.any()):
                return tuple(counts[chosen].tolist())
            chosen[gain.where(grows, gain.new_tensor(-torch.inf)).argmax()] += 1


def block_losses(run: Run, measurement: Measurement, neurons: int, batches: list[Batch]) -> BlockLosses:
    """Measure the loss of cutting each block's MLP alone.

    One pass: behind each block's MLP one more stream parts from the dense one, and all run on to the head.

    Args:
        run: The run. An interrupted measurement begins again.
        measurement: The importance of neurons.
        neurons: Number of neurons that the block keeps.
        batches: Sequences from `holdout.trial_batches`, of all ranks.
    """
    dense = run.dense
    finished = run.state.result(ALLOCATION_STAGE)
    if finished:
        tensors, _ = finished
        return BlockLosses(tensors["kl"].to(dense.device), neurons, tensors["error"].to(dense.device))
    mlp, sites = dense.table.mlp, dense.anatomy.sites
    errors: list[Tensor] = []
    streams: list[OffloadedTensors] = []
    report = run.report(ALLOCATION_STAGE, TOKENS * dense.anatomy.block_count // 2)
    for site in run.walk(held_out_first(batches)):
        report(site.block)
        if site.layer is None:
            break
        for parted in streams:
            run_parted(site, parted)
        if mlp in sites[site.index]:
            error, weight = _cut(run, site, measurement.neuron_importance[site.block], neurons)
            errors.append(error)
            streams.append(run.offload.tensors())
            for batch in site.activations:
                if batch.group == HELD_OUT_GROUP:
                    streams[-1].append(batch.hidden)
            with _replaced(dense, site, weight):
                run_parted(site, streams[-1])
    head, _ = make_heads(dense)
    each = divergences(head, site, streams, [head] * len(streams), run.ranks)
    kl = torch.tensor(each, dtype=torch.float64, device=dense.device)
    losses = BlockLosses(kl, neurons, torch.stack(errors))
    run.state.finish(ALLOCATION_STAGE, {"kl": losses.kl, "error": losses.error}, {})
    return losses


def _cut(run: Run, site: Site, importance: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """Cut a block's neurons and refit its MLP's writer, by ridge regression on tokens that aren't held out.

    Let G be the Gram matrix of the writer's inputs, in the order of importance, and G + r I = L L^T. With k neurons,
    the squared error of the writer W is the sum of |(W L)_j|^2 over j >= k. So one factorization gives the error for
    all k.

    Returns:
        The errors with 0 to all neurons, (neurons + 1,), and the writer's weight, (D, neurons), for the requested
        number of neurons. Cut neurons have zeros. Both are float64.
    """
    dense, ranks, mlp = run.dense, run.ranks, run.dense.table.mlp
    count = dense.anatomy.neuron_count
    gram = torch.zeros(count, count, dtype=torch.float64, device=dense.device)
    for batch in site.activations:
        if batch.group != HELD_OUT_GROUP:
            hidden = batch.hidden
            with captured_inputs(site.layer, mlp.observed, stop=True) as inputs:
                site.update(batch, hidden)
            weight = inverse_size(batch.rows(hidden), site.eps)
            if mlp.post_norm:
                weight = weight * inverse_size(batch.rows(inputs[mlp.post_norm]), site.eps)
            with products(run.precision.gram):
                add_gram(gram, batch.rows(inputs[mlp.neuron_writer]) * weight)
    order = importance.argsort(descending=True)
    gram = ranks.sum(gram)[order[:, None], order]
    gram.diagonal().add_(DEFAULT_RIDGE * gram.diagonal().mean().clamp_min(1e-30))
    gram = gram.to(run.precision.solve_dtype)  # this ridge bounds the condition
    writer, added = (of(dense, mlp, site)[:, order].to(gram.dtype) for of in (writer_weight, added_weight))
    with products("float32"):
        missing = gram[:neurons, neurons:] @ writer[:, neurons:].T
        factor = factor_in_place(gram)
        error = (added @ factor).square().sum(0).double().flip(0).cumsum(0).flip(0)
        fitted = writer[:, :neurons] + solve_in_place(factor[:neurons, :neurons], missing).T
    cut = torch.zeros_like(writer).index_copy(1, order[:neurons], fitted).double()
    return torch.cat([error, error.new_zeros(1)]), ranks.decide(cut)


@contextmanager
def _replaced(dense: DenseModel, site: Site, weight: Tensor) -> Iterator[None]:
    """Let the MLP's writer in a site's block have another weight, (D, neurons)."""
    name = dense.table.mlp.weight(dense.table.mlp.neuron_writer)
    parameter = site.layer.get_parameter(name)
    before = parameter.data
    parameter.data = dense.table.transpose({name: weight.to(before.dtype)})[name].contiguous()
    try:
        yield
    finally:
        parameter.data = before
