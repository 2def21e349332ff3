"""A sliced model's logits beside the dense model's, on sequences that nothing was fitted on.

What they are there is what other text will see: on the tokens that its layers were fitted on, a sliced model is better
than it is. So plans are compared on such sequences, and the gain before the head is fitted on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.covariance import normalize
from eigenslice.assembly import GlobalBasis, slice_embeddings, slice_head
from eigenslice.dense import DenseModel
from eigenslice.offload import OffloadedTensors
from eigenslice.plan import Plan
from eigenslice.ranks import ALONE, Ranks
from eigenslice.refitting import SlicedTwin
from eigenslice.stream import HELD_OUT_GROUP, Site

LOGITS = 2**24
"""Logits that are held at once."""
PULL = 1e-3
"""What a gain that differs by 1 from the mean of all costs, in nats per token."""
STEPS = 10
"""Iterations of L-BFGS."""


@dataclass(frozen=True)
class Head:
    """Logits from the normalized stream, scale * (x W^T + b).

    Attributes:
        weight: W, (vocabulary, width), float32; the final norm's gain is in it.
        bias: b, (vocabulary,), float32, or None.
        scale: The config's.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float

    def logits(self, rows: Tensor) -> Tensor:
        """(n, vocabulary), from rows (n, width)."""
        logits = rows @ self.weight.T
        return self.scale * (logits if self.bias is None else logits + self.bias)

    @property
    def at_once(self) -> int:
        """Tokens whose logits are held at once."""
        return max(1, LOGITS // len(self.weight))


def dense_head(dense: DenseModel) -> Head:
    """The dense model's."""
    rows, bias = dense.head()
    return Head(rows.to(torch.float32), None if bias is None else bias.float(), _scale(dense))


def sliced_head(dense: DenseModel, plan: Plan, basis: GlobalBasis, reading: Tensor | None) -> Head:
    """A sliced model's, whatever class it is saved as.

    Args:
        dense: The dense model.
        plan: What the result looks like.
        basis: Of all sites.
        reading: What an untied head reads, (D, width); None is what the basis says.
    """
    head, norm = dense.table.head, dense.table.final_norm
    custom = replace(plan, stock=None)  # another class computes the same
    tensors = dict(slice_head(dense, custom, basis.site, basis.tied_gain, torch.float32, reading))
    if plan.tied:
        embeddings = dict(slice_embeddings(dense, plan, basis.site, torch.float32))
        weight = embeddings[dense.table.embeddings[0] + ".weight"] * tensors[norm + ".weight"].float()
    else:
        weight = tensors[head + ".weight"]
    bias = tensors.get(head + ".bias")
    return Head(weight, None if bias is None else bias.float(), _scale(dense))


def _scale(dense: DenseModel) -> float:
    return dense.table.logit_scale(dense.config) if dense.table.logit_scale else 1.0


def _held_out(site: Site, streams: Sequence[OffloadedTensors], at_once: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """At the site before the head, held-out tokens' normalized rows: the dense ones (n, D), and those of streams."""
    for number, a in enumerate(site.activations):
        if a.group == HELD_OUT_GROUP:
            rows = a.rows(normalize(a.hidden, site.eps))
            others = [a.rows(normalize(stream[number], site.eps)) for stream in streams]
            for start in range(0, len(rows), at_once):
                part = slice(start, start + at_once)
                yield rows[part], [other[part] for other in others]


def divergences(
    whole: Head, site: Site, streams: Sequence[OffloadedTensors], heads: Sequence[Head], ranks: Ranks = ALONE
) -> list[float]:
    """KL(dense || other) at the site before the head, in nats per held-out token of all ranks.

    Args:
        whole: The dense model's head.
        site: The one before the head.
        streams: The others', there.
        heads: The others'.
        ranks: Who share the sequences.
    """
    totals = torch.zeros(len(streams) + 1, dtype=torch.float64, device=whole.weight.device)  # and the number of tokens
    for rows, others in _held_out(site, streams, whole.at_once):
        totals[-1] += len(rows)
        expected = whole.logits(rows).log_softmax(-1)
        for index, (head, other) in enumerate(zip(heads, others, strict=True)):
            actual = head.logits(other).log_softmax(-1)
            totals[index] += (expected.exp() * (expected - actual)).sum(-1).double().sum()
    *losses, tokens = ranks.decide(ranks.sum(totals)).tolist()
    return [loss / tokens for loss in losses]


@dataclass(frozen=True)
class GainFit:
    """The gain before a sliced model's head.

    Attributes:
        gain: (width,), float64; multiplies what the head reads.
        tokens: That it was fitted on.
        kl_before, kl_after: KL(dense || sliced) there without and with it, in nats per token.
    """

    gain: Tensor
    tokens: int
    kl_before: float
    kl_after: float

    def describe(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {
            "tokens": self.tokens,
            "mean_gain": float(self.gain.mean()),
            "kl_before": self.kl_before,
            "kl_after": self.kl_after,
        }


def fit_gain(dense: DenseModel, site: Site, twin: SlicedTwin, head: Head, ranks: Ranks = ALONE) -> GainFit | None:
    """The gain that brings a sliced model's logits nearest to the dense one's on held-out tokens.

    What slicing loses acts as noise in the stream, and a head that reads it as if there were none is too sure of
    itself. The g that minimizes mean KL(dense || softmax(scale * ((x * g) W^T + b))) + PULL * |g - mean(g)|^2: a
    convex problem in as many numbers as the stream is wide. With P the dense probabilities, the KL depends on them
    only by P W, so that a step costs two products with W.

    Args:
        dense: The dense model.
        site: The one before the head.
        twin: The sliced model, there.
        head: Its head without the gain.
        ranks: Whose held-out tokens it is fitted on.

    Returns:
        None where no sequence was held out.
    """
    whole = dense_head(dense)
    kept: list[tuple[Tensor, Tensor]] = []  # x and P W
    fixed = torch.zeros(2, dtype=torch.float64, device=dense.device)  # what of the KL g doesn't change; tokens
    for rows, (sliced,) in _held_out(site, [twin.streams], whole.at_once):
        expected = whole.logits(rows).log_softmax(-1)
        probabilities = expected.exp()
        kept.append((sliced, head.scale * (probabilities @ head.weight)))
        bias = 0.0 if head.bias is None else head.scale * (probabilities @ head.bias).double().sum()
        fixed[0] += (probabilities * expected).sum(-1).double().sum() - bias
        fixed[1] += len(rows)
    del whole
    constant, tokens = ranks.sum(fixed).tolist()
    if not tokens:
        return None

    def divergence(gain: Tensor) -> tuple[Tensor, Tensor]:
        """The KL and its gradient."""
        sums = torch.zeros(1 + len(gain), dtype=torch.float64, device=dense.device)
        for sliced, target in kept:
            logits = head.logits(sliced * gain)
            total = logits.logsumexp(-1, keepdim=True)
            error = head.scale * ((logits - total).exp_() @ head.weight) - target
            sums[0] += total.double().sum() - ((sliced * gain) * target).double().sum()
            sums[1:] += (error * sliced).sum(0)
        sums = ranks.sum(sums) / tokens
        return sums[0] + constant / tokens, sums[1:]

    gain = torch.ones(head.weight.shape[1], dtype=torch.float32, device=dense.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([gain], max_iter=STEPS, line_search_fn="strong_wolfe")
    losses: list[float] = []

    def closure() -> float:
        loss, gradient = divergence(gain.detach())
        losses.append(float(loss))
        away = gain.detach() - gain.detach().mean()
        gain.grad = (gradient + 2 * PULL * away).float()
        return float(loss + PULL * away.square().sum())

    optimizer.step(closure)
    fitted = ranks.decide(gain.detach().double())
    return GainFit(fitted, int(tokens), losses[0], float(divergence(fitted.float())[0]))
