"""The loss of a sliced model on held-out text, which tells the user how good the result is.

Both models predict the tokens of held-out sequences of the calibration texts, as `eigenslice eval` lets a model predict
them: tokens 2 to T of a sequence, without padding. Text of the model's own and random tokens don't count.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.covariance import normalize
from eigenslice.algebra.finite import LARGEST_EXPONENT
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.measure.divergence import ROWS, Head, kl_of_rows
from eigenslice.runtime.ranks import Ranks


@dataclass(frozen=True)
class Loss:
    """The loss of a sliced model on held-out text, in nats per predicted token.

    Attributes:
        kl: KL(dense || sliced).
        dense: Cross entropy of the dense model.
        sliced: Cross entropy of the sliced model.
        tokens: Number of predicted tokens.
    """

    kl: float
    dense: float
    sliced: float
    tokens: int

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        if not all(map(math.isfinite, (self.kl, self.dense, self.sliced))):
            return not_measured("the sliced model's logits on held-out text are NaN or infinite")
        return {
            "kl": max(0.0, self.kl),  # rounding may take it below
            "perplexity_ratio": _exp(self.sliced - self.dense),
            "dense_perplexity": _exp(self.dense),
            "sliced_perplexity": _exp(self.sliced),
            "tokens": self.tokens,
        }


def not_measured(reason: str) -> dict[str, Any]:
    """Return the manifest's entry where no loss is known, with the reason."""
    return {"not_measured": reason}


def held_out_texts(batches: list[Batch]) -> Iterator[tuple[int, Batch]]:
    """Yield held-out sequences of texts, each batch with its number."""
    for number, batch in enumerate(batches):
        if batch.group == HELD_OUT_GROUP and not batch.own:
            yield number, batch


def predicting_rows(batch: Batch, stream: Tensor, eps: float) -> Tensor:
    """Normalized rows (n, width), in at least float32, at which a batch's next tokens are predicted.

    Args:
        batch: The sequences.
        stream: Their stream before the head, (B, T, width).
        eps: The epsilon of the norm.
    """
    rows = normalize(stream, eps)[:, :-1][batch.predicted.to(stream.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def next_tokens(batch: Batch) -> Tensor:
    """Ids of a batch's predicted tokens, (n,)."""
    return batch.input_ids[:, 1:][batch.predicted]


def measure_loss(
    whole: Head, head: Head, predictions: Iterable[tuple[Tensor, Tensor, Tensor]], ranks: Ranks
) -> Loss | None:
    """Measure the loss of a sliced model.

    Args:
        whole: The dense model's head.
        head: The sliced model's head.
        predictions: The dense model's rows (n, D), the sliced model's rows (n, width) and the next tokens' ids (n,).
        ranks: The processes that share the sequences.

    Returns:
        None where no token was held out.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=whole.weight.device)
    for dense, sliced, targets in predictions:
        for start in range(0, len(targets), ROWS):
            part = slice(start, start + ROWS)
            ids = targets[part].to(dense.device)
            (kl,) = kl_of_rows(whole, dense[part], [head], [sliced[part]])
            sums[0] += kl.double().sum()
            sums[1] += _cross_entropy(whole, dense[part], ids)
            sums[2] += _cross_entropy(head, sliced[part], ids)
            sums[3] += len(ids)
    *losses, tokens = ranks.decide(ranks.sum(sums)).tolist()
    if not tokens:
        return None
    kl, of_dense, of_sliced = (loss / tokens for loss in losses)
    return Loss(kl, of_dense, of_sliced, int(tokens))


def _cross_entropy(head: Head, rows: Tensor, ids: Tensor) -> Tensor:
    """Return the sum of -log p(id) over rows (n, width) and their next tokens' ids (n,), in nats."""
    read = head.read(rows)
    return (head.log_total(read) - head.chosen_logits(read, ids)).double().sum()


def _exp(nats: float) -> float:
    return math.exp(min(nats, LARGEST_EXPONENT))
