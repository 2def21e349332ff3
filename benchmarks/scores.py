"""How far models are from the dense one on the same tokens: loss, KL divergence, agreement of the first choice."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.data.batches import Batch
from eigenslice.evaluation.perplexity import LARGEST_LOSS, predictions

POSITIONS = 128  # whose distributions are compared at once, so that a large vocabulary's fit into memory


@dataclass
class Score:
    """Means over all predicted tokens of all windows, so that a short last window counts by its tokens.

    Attributes:
        loss: Negative log-likelihood in nats per token.
        kl: KL(dense || model) in nats per token: sum over the vocabulary of p_dense (log p_dense - log p_model).
        top1: Share of tokens for which both models' most likely token is the same.
        tokens: Number of predicted tokens.
    """

    loss: float = 0.0
    kl: float = 0.0
    top1: float = 0.0
    tokens: int = 0

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no float."""
        return math.exp(self.loss) if self.loss < LARGEST_LOSS else math.inf

    def add(self, dense: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count P more tokens: logits (P, V) of both models for targets (P,); sums until `mean` is called."""
        log_p = dense.float().log_softmax(-1)
        log_q = logits.float().log_softmax(-1)
        self.loss -= float(log_q.gather(1, targets[:, None]).double().sum())
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        self.top1 += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.tokens += len(targets)

    def mean(self) -> "Score":
        """The sums so far as means."""
        return Score(self.loss / self.tokens, self.kl / self.tokens, self.top1 / self.tokens, self.tokens)


def compare(
    dense: Any,
    models: list[Any],
    batches: list[Batch],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Score the dense model and each other one, window by window: the dense logits are computed once a window.

    Args:
        dense: The dense model.
        models: Models with its vocabulary.
        batches: Windows of tokens.
        progress: Called with the number of batches done and of all.

    Returns:
        The dense model's score (KL 0, agreement 1), then the models'.
    """
    scores = [Score() for _ in range(1 + len(models))]
    with torch.no_grad():
        for number, batch in enumerate(batches):
            progress(number, len(batches))
            for row in range(batch.input_ids.shape[0]):
                expected, targets = predictions(dense, batch, row)
                for score, model in zip(scores, [None, *models], strict=True):
                    logits = expected if model is None else predictions(model, batch, row)[0]
                    parts = (tensor.split(POSITIONS) for tensor in (expected, logits, targets))
                    for part in zip(*parts, strict=True):
                        score.add(*part)
    return [score.mean() for score in scores]
