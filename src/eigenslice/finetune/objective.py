"""The objective of the training: the next token's loss, the divergence from a teacher, or a mixture of both."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Target of positions that predict nothing: padding, and the last token of a sequence."""
LOGITS = 2**21
"""Logits that are computed with at once in float32; on CPU they stay in the cache."""


def shifted_targets(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The token that each position (B, T) predicts: the next one, `IGNORED` where that is padding or there is none."""
    following = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
    return torch.cat([following[:, 1:], torch.full_like(following[:, :1], IGNORED)], dim=1)


def parts(positions: int, vocabulary: int) -> list[slice]:
    """Return parts of so many positions, of which `LOGITS` logits are computed with at once."""
    size = max(1, LOGITS // vocabulary)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def summed_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float) -> Tensor:
    """Sum over predicting positions of distill * KL(teacher || model) - (1 - distill) * log p(target), in nats.

    Args:
        logits: The model's, (..., V).
        targets: (...), `IGNORED` where nothing is predicted.
        teacher: The teacher's logits (..., V); None if distill is 0.
        distill: Share of the divergence.
    """
    assert teacher is not None or not distill
    vocabulary = logits.shape[-1]
    expected = None if teacher is None or not distill else teacher.reshape(-1, vocabulary)
    return _SummedLoss.apply(logits.reshape(-1, vocabulary), targets.reshape(-1), expected, distill)  # pyright: ignore


class _SummedLoss(torch.autograd.Function):
    """The loss and its gradient in one pass over the logits.

    The gradient of each position is q - distill * p - (1 - distill) * e. q are the model's probabilities, p the
    teacher's, and e is 1 for the target. Autograd would keep or compute again several copies of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float) -> Tensor:
        """Return the sum; arguments as those of `summed_loss`, with logits (n, V)."""
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits)
        for part in parts(*logits.shape):
            counts = (targets[part] != IGNORED).float()
            log_q = logits[part].float().log_softmax(-1)
            slope = log_q.exp()
            if teacher is not None:
                log_p = teacher[part].float().log_softmax(-1)
                p = log_p.exp()
                total += distill * (torch.linalg.vecdot(p, log_p - log_q) * counts).sum()
                slope.sub_(p, alpha=distill)
            if distill < 1:
                target = targets[part].clamp_min(0)[:, None]
                total -= (1 - distill) * (log_q.gather(1, target)[:, 0] * counts).sum()
                slope.scatter_add_(1, target, torch.full_like(counts[:, None], distill - 1))
            gradient[part] = slope * counts[:, None]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Any:
        """Return the gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * factors[0].to(gradient.dtype), None, None, None
