"""The objective of the training: the next token's loss, the divergence from a teacher, or a mixture of both."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target of positions that predict nothing: padding, and the last token of a sequence."""
POSITIONS = 512
"""Positions at once, so that only a few float32 copies of their logits are alive."""


def shifted_targets(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The token that each position (B, T) predicts: the next one, `IGNORED` where that is padding or there is none."""
    following = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
    return torch.cat([following[:, 1:], torch.full_like(following[:, :1], IGNORED)], dim=1)


def summed_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float) -> Tensor:
    """Sum over predicting positions of distill * KL(teacher || model) - (1 - distill) * log p(target), in nats.

    Args:
        logits: The model's, (..., V).
        targets: (...), `IGNORED` where nothing is predicted.
        teacher: The teacher's logits (..., V); None if distill is 0.
        distill: Share of the divergence.
    """
    vocabulary = logits.shape[-1]
    flat, wanted = logits.reshape(-1, vocabulary), targets.reshape(-1)
    expected = None if teacher is None or not distill else teacher.reshape(-1, vocabulary)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, len(flat), POSITIONS):
        part = slice(start, start + POSITIONS)
        inputs = (flat[part], wanted[part], None if expected is None else expected[part], distill)
        # the backward pass computes the parts' softmaxes again instead of keeping them
        total = total + checkpoint(_part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return total


def _part(logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    loss = log_p.new_zeros(())
    if teacher is not None:
        divergence = kl_div(log_p, teacher.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        loss = loss + distill * divergence[targets != IGNORED].sum()
    if distill < 1:
        loss = loss + (1 - distill) * nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
    return loss
