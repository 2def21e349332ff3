"""The gain before a sliced model's head, fitted on held-out sequences."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.measure.divergence import Head, dense_head, held_out_rows
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.stream.run import Run
from eigenslice.stream.walk import Site

PULL = 1e-3
"""Cost of a gain that differs by 1 from the mean of all gains, in nats per token."""
LBFGS_ITERATIONS = 10
"""Largest number of iterations of L-BFGS."""


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


def fit_gain(run: Run, site: Site, streams: OffloadedTensors, head: Head) -> GainFit | None:
    """Fit the gain that brings a sliced model's logits nearest to the dense one's on held-out tokens.

    The loss of slicing acts as noise in the stream. A head that ignores this noise is too sure of itself. The gain g
    minimizes mean KL(dense || softmax(scale * ((x * g) W^T + b))) + PULL * |g - mean(g)|^2. This is a convex problem
    with one unknown for each dimension of the stream. The KL depends on the dense probabilities P only by P W, so a
    step costs two products with W.

    Args:
        run: The run.
        site: The site before the head.
        streams: The sliced streams at this site.
        head: The sliced model's head without the gain.

    Returns:
        The gain; None if no sequence was held out.
    """
    dense, ranks = run.dense, run.ranks
    whole = dense_head(dense)
    kept: list[tuple[Tensor, Tensor]] = []  # x and P W
    fixed = torch.zeros(2, dtype=torch.float64, device=dense.device)  # the KL's part without g; tokens
    for rows, (sliced,) in held_out_rows(site, [streams], whole.at_once):
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
    optimizer = torch.optim.LBFGS([gain], max_iter=LBFGS_ITERATIONS, line_search_fn="strong_wolfe")
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
