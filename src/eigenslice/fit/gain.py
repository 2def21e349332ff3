"""The gain before a sliced model's head, fitted on held-out sequences."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.data.batches import HELD_OUT_GROUP
from eigenslice.measure.divergence import Head, held_out_rows
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.stream.run import Run
from eigenslice.stream.walk import Site

PULL = 1e-3
"""Cost of a gain that differs by 1 from the mean of all gains, in nats per token."""
LBFGS_ITERATIONS = 10
"""Largest number of iterations of L-BFGS."""
PASSES = 2 + LBFGS_ITERATIONS * 5 // 4
"""Passes over the held-out sequences, about: for the dense probabilities, of L-BFGS, and for the loss in the end."""
HEAD_STAGE = "head"
"""Stage of the run; a step is a pass of one batch of held-out sequences."""


@dataclass(frozen=True)
class GainFit:
    """The gain before a sliced model's head.

    Attributes:
        gain: Factors of the head's input, (width,), float64.
        tokens: Number of tokens that it was fitted on.
        kl_before, kl_after: KL(dense || sliced) on these tokens without and with the gain, in nats per token.
    """

    gain: Tensor
    tokens: int
    kl_before: float
    kl_after: float

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {
            "tokens": self.tokens,
            "mean_gain": float(self.gain.mean()),
            "kl_before": self.kl_before,
            "kl_after": self.kl_after,
        }


def fit_gain(run: Run, site: Site, streams: OffloadedTensors, whole: Head, head: Head) -> GainFit | None:
    """Fit the gain that brings a sliced model's logits nearest to the dense one's on held-out tokens.

    The loss of slicing acts as noise in the stream. A head that ignores this noise is too sure of itself. The gain g
    minimizes mean KL(dense || softmax(scale * ((x * g) R^T W^T + b))) + PULL * |g - mean(g)|^2, with the head's map R
    and weight W. This is a convex problem with one unknown for each dimension of the stream. The KL depends on the
    dense probabilities P only by P W, so a step costs two products with W.

    Args:
        run: The run.
        site: The site before the head.
        streams: The sliced streams at this site.
        whole: The dense model's head.
        head: The sliced model's head without the gain.

    Returns:
        The gain; None if no sequence was held out.
    """
    objective = _Objective(run, site, streams, whole, head)
    if not objective.tokens:
        return None
    gain = torch.ones(head.reading.shape[1], dtype=torch.float32, device=run.dense.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([gain], max_iter=LBFGS_ITERATIONS, line_search_fn="strong_wolfe")
    losses: list[float] = []

    def closure() -> float:
        loss, gradient = objective.divergence(gain.detach())
        losses.append(float(loss))
        away = gain.detach() - gain.detach().mean()
        gain.grad = (gradient + 2 * PULL * away).float()
        return float(loss + PULL * away.square().sum())

    optimizer.step(closure)
    fitted = run.ranks.decide(gain.detach().double())
    after = float(objective.divergence(fitted.float())[0])
    objective.report(PASSES)
    return GainFit(fitted, int(objective.tokens), losses[0], after)


class _Objective:
    """KL(dense || sliced) over the held-out tokens of all ranks, as a function of the gain.

    Attributes:
        tokens: Number of the tokens.
    """

    def __init__(self, run: Run, site: Site, streams: OffloadedTensors, whole: Head, head: Head) -> None:
        """Compute what the gain doesn't change; for the arguments, see `fit_gain`."""
        self._run, self._head, self._passes = run, head, 1
        self._batches = sum(batch.group == HELD_OUT_GROUP for batch in site.activations)
        self._kept: list[tuple[Tensor, Tensor]] = []  # x and scale * P W R
        fixed = torch.zeros(2, dtype=torch.float64, device=run.dense.device)  # the KL's part without g; tokens
        self.report(0)
        for rows, (sliced,) in held_out_rows(site, [streams]):
            target, known = _expected(whole, rows, head)
            self._kept.append((sliced, target))
            fixed[0] += known
            fixed[1] += len(rows)
            self.report(min(1.0, len(self._kept) / self._batches))
        self._constant, self.tokens = run.ranks.sum(fixed).tolist()

    def divergence(self, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Return the KL, in nats per token, and its gradient."""
        sums = torch.zeros(1 + len(gain), dtype=torch.float64, device=gain.device)
        for number, (sliced, target) in enumerate(self._kept):
            self.report(self._passes + number / len(self._kept))
            total, mean = _mean_weight(self._head, sliced * gain)
            sums[0] += total.double().sum() - ((sliced * gain) * target).double().sum()
            sums[1:] += ((self._head.scale * mean - target) * sliced).sum(0)
        self._passes += 1
        sums = self._run.ranks.sum(sums) / self.tokens
        return sums[0] + self._constant / self.tokens, sums[1:]

    def report(self, passes: float) -> None:
        """Tell how many passes over the tokens are done."""
        if self._batches:
            self._run.progress(HEAD_STAGE, int(self._batches * min(passes, PASSES)), self._batches * PASSES)


def _expected(whole: Head, rows: Tensor, head: Head) -> tuple[Tensor, float]:
    """Return the parts of KL(dense || sliced) that the gain doesn't change; P are the dense probabilities.

    Args:
        whole: The dense model's head.
        rows: Its rows, (n, D).
        head: The sliced model's head, with the weight W.

    Returns:
        scale * P W R, (n, width); and the sum over the rows of P log P - scale * P b.
    """
    rows = whole.read(rows)
    total, known = whole.log_total(rows, bounded=False), 0.0
    target = torch.zeros_like(rows)
    for part in whole.parts(len(rows)):
        log_p = whole.logits(rows, part, bounded=False) - total[:, None]
        p = log_p.exp()
        target.addmm_(p, head.weight[part], alpha=head.scale)
        known += float(torch.linalg.vecdot(p, log_p).double().sum())
        known -= 0.0 if head.bias is None else head.scale * float((p @ head.bias[part]).double().sum())
    return head.read_back(target), known


def _mean_weight(head: Head, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum of exp(logits), (n,), and softmax(logits) W R, (n, width), in one pass over W.

    The sums so far are scaled down whenever a larger logit comes (online softmax, arXiv 1805.02867).

    Args:
        head: The head, with the map R and the weight W; its bound doesn't count.
        rows: The rows, (n, width).
    """
    rows = head.read(rows)
    largest = rows.new_full((len(rows), 1), -torch.inf)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(rows)
    for part in head.parts(len(rows)):
        logits = head.logits(rows, part, bounded=False)
        larger = torch.maximum(largest, logits.amax(-1, keepdim=True))
        shrink = (largest - larger).exp_()
        p = (logits - larger).exp_()
        total = total * shrink + p.sum(-1, keepdim=True)
        weighted = torch.addmm(weighted * shrink, p, head.weight[part])
        largest = larger
    return (largest + total.log())[:, 0], head.read_back(weighted / total)
