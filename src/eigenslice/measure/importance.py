"""One pass of the dense model over the calibration tokens: statistics for the choice of bases, neurons and heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.basis import Spectrum, principal_components
from eigenslice.algebra.covariance import add_gram
from eigenslice.algebra.elimination import rank_groups
from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.arch import Sublayer
from eigenslice.arch.heads import HeadCounts
from eigenslice.cut.blocks import Kept
from eigenslice.cut.ends import GlobalCut, global_basis
from eigenslice.measure.expert_saliency import ExpertSums
from eigenslice.model.dense import DenseModel
from eigenslice.plan.plan import Plan
from eigenslice.runtime.precision import products
from eigenslice.stream.experts import Experts, Routing
from eigenslice.stream.run import Run
from eigenslice.stream.runner import has_experts, has_module
from eigenslice.stream.walk import STREAMS, Activations, Site

MEASURING_STAGE = "measuring"

HEAD_WEIGHT = 5.0
"""Weight of the site before the head in a global basis, because a cut there is a cut of the logits. On SmolLM2-135M at
3/4 of the width, before refitting, 5 lowers the perplexity by 4 % against 1; 10 is no better."""


@dataclass(frozen=True)
class Measurement:
    """Statistics of the dense model from one pass.

    Attributes:
        spectrum: Principal components of the normalized stream, its second moment summed over sites.
        neuron_importance: For each block, the energy that each MLP neuron adds to the stream, as a share of the
            stream's energy. Summed over tokens, (neurons,), or (experts, neurons). Empty if neurons won't be cut.
        head_order: For each block, its key/value heads, most missed first, (heads,). Empty if heads won't be cut.
        shared_importance: For each block, the same as `neuron_importance` for the neurons of shared experts,
            (neurons,). Empty without shared experts.
        query_order: For each block, its query heads, most missed first, (query heads,). Empty if heads won't be cut.
        head_counts: Numbers of heads in the dense model; None if they can't be cut.
        expert_order: For each block, its experts, most missed first, (experts,). Empty without mixtures.
        expert_groups: Number of groups of experts, of each of which equally many stay.
    """

    spectrum: Spectrum
    neuron_importance: list[Tensor]
    head_order: list[Tensor]
    shared_importance: list[Tensor] = field(default_factory=list)
    query_order: list[Tensor] = field(default_factory=list)
    head_counts: HeadCounts | None = None
    expert_order: list[Tensor] = field(default_factory=list)
    expert_groups: int = 1

    def cut(self, dense: DenseModel, plan: Plan) -> GlobalCut:
        """Return the basis, neurons and heads that a plan with a global basis keeps."""
        return GlobalCut(plan, global_basis(dense, plan, self.spectrum), self.kept(plan))

    def kept(self, plan: Plan) -> list[Kept]:
        """The most important neurons, heads and experts of each block that a plan keeps, as many as it keeps."""
        result = []
        for block, count in zip(plan.kept_blocks, plan.neurons_per_block, strict=True):
            neurons, shared, experts = None, None, self._kept_experts(plan, block)
            if self.neuron_importance and count < self.neuron_importance[block].shape[-1]:
                whole = self.neuron_importance[block].shape[-1]
                importance = self.neuron_importance[block]
                neurons = (importance if experts is None else importance[experts]).topk(count).indices.sort().values
                if self.shared_importance:
                    times = len(self.shared_importance[block]) // whole
                    shared = self.shared_importance[block].topk(times * count).indices.sort().values
            result.append(Kept(neurons, shared, self._kept_queries(plan, block), self.head_counts, experts))
        return result

    def _kept_experts(self, plan: Plan, block: int) -> Tensor | None:
        """Return the experts that a plan keeps in a block, (experts,), ascending; None is all."""
        if plan.experts is None:
            return None
        order, groups = self.expert_order[block], self.expert_groups
        group = order // (len(order) // groups)
        return torch.cat([order[group == number][: plan.experts // groups] for number in range(groups)]).sort().values

    def _kept_queries(self, plan: Plan, block: int) -> Tensor | None:
        """Return the query heads that a plan keeps in a block, (key/value heads, query heads of each); None: all."""
        dense = self.head_counts
        if not self.head_order or dense is None or (plan.kv_heads is None and plan.query_heads is None):
            return None
        heads = self.head_order[block][: plan.kv_heads or dense.kv].sort().values
        group = dense.group if plan.query_heads is None else plan.query_heads // len(heads)
        order = self.query_order[block]
        each = [order[order // dense.group == head][:group].sort().values for head in heads]
        return torch.stack(each)


def measure(run: Run, *, neurons: bool = True, heads: bool = True) -> Measurement:
    """Run the dense model once over all calibration sequences.

    A neuron's importance is the sum over tokens of a_i^2 / mean(x^2), times |W_i|^2. This is the energy that the neuron
    adds to the stream x; the next norm divides it by the stream's energy. For a neuron of an expert, the sum is over
    the expert's tokens, and a_i is multiplied by the router's weight. Without any token, the importance is |W_i|^2.

    An expert is missed by the sum over its tokens of its output's norm, times the router's weight, over the norm of the
    stream. REAP (arXiv 2510.13999) takes the mean instead, without the stream's norm. On a trained Qwen3-MoE of a
    million parameters that keeps 12 of 16 experts, the sum loses 0.024 nats and the mean 0.069, without a fit; with
    the fit, 0.009 and 0.031. The error of the mixture without the expert, with the router's next choice, is worse, too:
    0.036 and 0.013.

    Heads are eliminated one after the other. Each time, the head goes that the other heads can best make up for, with
    their writer refitted.

    Args:
        run: The run. The measurement is saved in its state, and goes on from there.
        neurons: True if neurons or experts may be cut; their energies are measured then.
        heads: True if heads may be cut.
    """
    dense, anatomy, state, ranks = run.dense, run.dense.anatomy, run.state, run.ranks
    finished = state.result(MEASURING_STAGE)
    if finished:
        saved = {name: tensor.to(dense.device) for name, tensor in finished[0].items()}
        return _measurement(run, saved)
    sums = _Sums(run, anatomy.neuron_count if neurons else 0, anatomy.head_counts if heads else None)
    position = state.position(MEASURING_STAGE)
    if position:
        sums.restore(position.tensors)
    report = run.report(MEASURING_STAGE)
    for site in run.walk(run.tokens.batches, sums.observe, sums.observed, position=position):
        report(site.block)
        if site.passed_block:
            sums.rank_heads(site.block - 1)
            state.save(MEASURING_STAGE, site.block, {STREAMS: site.streams}, sums.tensors(), dict)
        if site.layer is not None and site.index == 0:
            sums.begin_block(site)
        with products(run.precision.gram):
            sums.moment += (HEAD_WEIGHT if site.layer is None else 1.0) * site.moment(normalized=True)
    energies = ranks.sum(sums.energies)
    if anatomy.expert_count:
        energies[energies.sum(-1) == 0] = 1.0
    result = {
        "moment": ranks.sum(sums.moment),
        "importance": energies * sums.columns,
        "heads": sums.order,
        "shared": ranks.sum(sums.shared),
        "queries": sums.query_order,
        "experts": ranks.decide(ranks.sum(sums.outputs).argsort(dim=-1, descending=True, stable=True)),
    }
    state.finish(MEASURING_STAGE, result, {})
    return _measurement(run, result)


def _measurement(run: Run, tensors: Mapping[str, Tensor]) -> Measurement:
    """Return the measurement that a state holds."""
    names = ("importance", "heads", "shared", "queries", "experts")
    importance, heads, shared, queries, experts = (list(tensors[name]) for name in names)
    anatomy = run.dense.anatomy
    counts, groups = anatomy.head_counts, anatomy.expert_groups if anatomy.expert_count else 1
    return Measurement(_spectrum(run, tensors["moment"]), importance, heads, shared, queries, counts, experts, groups)


class _Sums:
    """The sums over tokens of a measurement.

    Attributes:
        observed: The sublayers whose writers' inputs are summed.
        moment: Second moment of the normalized stream, (D, D).
        energies: For each block, the energies of the neurons' outputs, (neurons,) or (experts, neurons).
        columns: Squared norms of the MLP writers' columns, in the same shape.
        shared: For each block, the energies of shared experts' neurons times the squared norms of their columns.
        order: For each block, its key/value heads, the most missed head first.
        query_order: For each block, its query heads, the most missed head first.
        outputs: For each block, norms of the experts' outputs times the router's weight, over the stream's, (experts,).
    """

    def __init__(self, run: Run, neurons: int, heads: HeadCounts | None) -> None:
        """Begin with zeros.

        Args:
            run: The run.
            neurons: Number of neurons to measure in each block, or in each of its experts; 0 measures none.
            heads: Numbers of heads to rank in each block; None ranks none.
        """
        dense, anatomy = run.dense, run.dense.anatomy
        self._dense, self._ranks, self._neurons, self._heads = dense, run.ranks, neurons, heads
        self._precision = run.precision
        self._attention, self._mlp = dense.table.attention, dense.table.mlp
        self.observed = [s for s, used in ((self._attention, heads), (self._mlp, neurons)) if used]
        self._options: dict[str, Any] = {"dtype": torch.float64, "device": dense.device}
        self.moment = torch.zeros(anatomy.width, anatomy.width, **self._options)
        each = (anatomy.expert_count, neurons) if anatomy.expert_count else (neurons,)
        self.energies = torch.zeros(anatomy.block_count if neurons else 0, *each, **self._options)
        self.columns = torch.ones_like(self.energies)
        self.shared = torch.zeros(
            anatomy.block_count if neurons and anatomy.shared_neuron_count else 0,
            anatomy.shared_neuron_count,
            **self._options,
        )
        self.outputs = torch.zeros(anatomy.block_count if neurons else 0, anatomy.expert_count, **self._options)
        blocks, kv, queries = (anatomy.block_count, heads.kv, heads.queries) if heads else (0, 0, 0)
        # A layer without heads, such as a recurrent one, keeps this order
        self.order = torch.arange(kv, device=dense.device).repeat(blocks, 1)
        self.query_order = torch.arange(queries, device=dense.device).repeat(blocks, 1)
        # Of the block that the stream passes
        self._experts: Experts | None = None
        self._shared_columns = torch.zeros(0, **self._options)
        self._gram = torch.zeros(0, 0, **self._options)  # of the inputs of the attention's writer
        self._writer = torch.zeros(0, 0, **self._options)  # the attention writer's weight

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums, as a saved state has them."""
        sums = {"moment": self.moment, "energies": self.energies, "columns": self.columns}
        sums |= {"shared": self.shared, "heads": self.order, "queries": self.query_order}
        return sums | {"outputs": self.outputs}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the sums of a saved state."""
        names = ("moment", "energies", "columns", "shared", "heads", "queries", "outputs")
        saved = (tensors[name].to(self._dense.device) for name in names)
        self.moment, self.energies, self.columns, self.shared, self.order, self.query_order, self.outputs = saved

    def begin_block(self, site: Site) -> None:
        """Take the weights of a block's writers, at its first site."""
        dense, mlp = self._dense, self._mlp
        if self._neurons and (not mlp.stacked or has_experts(site.layer, mlp)):
            self.columns[site.block] = added_weight(dense, mlp, site).square().sum(-2)
            if mlp.stacked:
                self._experts = Experts.of(dense.table, mlp, site.layer)
            if mlp.shared_writer:
                self._shared_columns = added_weight(dense, mlp, site, mlp.shared_writer).square().sum(-2)
        self._writer = torch.zeros(0, 0, **self._options)
        if self._heads and has_module(site.layer, self._attention.neuron_writer):
            self._writer = added_weight(dense, self._attention, site)
            self._gram = torch.zeros(self._writer.shape[1], self._writer.shape[1], **self._options)

    def observe(self, block: int, sublayer: Sublayer, batch: Activations, inputs: Mapping[str, Any]) -> None:
        """Add the inputs of a sublayer's writers; see `Observer`."""
        mlp = self._mlp
        eps = self._dense.anatomy.eps
        size = batch.rows(batch.hidden).square().mean(-1, keepdim=True) + eps
        if sublayer.post_norm:  # which divides, too
            size = size * (batch.rows(inputs[sublayer.post_norm]).square().mean(-1, keepdim=True) + eps)

        def energy(writer: str) -> Tensor:
            return (batch.rows(inputs[writer]).square() / size).sum(0).to(torch.float64)

        if sublayer is self._attention:
            if not len(self._writer):
                return
            with products(self._precision.gram):
                add_gram(self._gram, batch.rows(inputs[sublayer.neuron_writer]) * size.rsqrt())
        elif self._experts is None:
            self.energies[block] += energy(mlp.neuron_writer)
        else:
            sums = ExpertSums.of(self._experts, *Routing.of(batch, inputs[mlp.experts]), size)
            self.energies[block] += sums.neurons
            self.outputs[block] += sums.outputs
            if mlp.shared_writer:
                self.shared[block] += energy(mlp.shared_writer) * self._shared_columns

    def rank_heads(self, block: int) -> None:
        """Rank the heads of a block that the stream has passed."""
        if not self._heads or not len(self._writer):
            return
        gram = self._ranks.sum(self._gram)
        self.order[block] = self._ranks.decide(rank_groups(gram, self._writer, self._heads.kv, DEFAULT_RIDGE))
        queries = self.order[block]
        if self._heads.group > 1:
            queries = self._ranks.decide(rank_groups(gram, self._writer, self._heads.queries, DEFAULT_RIDGE))
        self.query_order[block] = queries


def _spectrum(run: Run, moment: Tensor) -> Spectrum:
    """Return the principal components of a second moment, the same on all ranks."""
    spectrum = principal_components(moment, run.dense.anatomy.layer_norm)
    return replace(spectrum, vectors=run.ranks.decide(spectrum.vectors.contiguous()))


def writer_weight(dense: DenseModel, sublayer: Sublayer, site: Site, writer: str | None = None) -> Tensor:
    """Return the weight of a writer (None: of neurons or heads) in a block, (D, n) or (experts, D, n); float64."""
    name = sublayer.weight(writer or sublayer.neuron_writer)
    return dense.table.transpose({name: site.layer.get_parameter(name)})[name].to(torch.float64)


def added_weight(dense: DenseModel, sublayer: Sublayer, site: Site, writer: str | None = None) -> Tensor:
    """Return a writer's weight as `writer_weight`, times the gain of a norm between the writer and the stream."""
    weight = writer_weight(dense, sublayer, site, writer)
    return weight * post_gain(sublayer, site)[:, None] if sublayer.post_norm else weight


def post_gain(sublayer: Sublayer, site: Site) -> Tensor:
    """Return the gain of a sublayer's post norm in a site's block, (D,), float64."""
    return site.layer.get_parameter(sublayer.post_gain).to(torch.float64)
