"""A sliced model's logits beside the dense model's, on sequences that nothing was fitted on.

On the tokens that its layers were fitted on, a sliced model looks better than on other text. So plans are compared on
held-out sequences, and the gain before the head is fitted on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenslice.algebra.covariance import normalize
from eigenslice.cut.ends import GlobalCut, slice_embeddings, slice_head
from eigenslice.data.batches import HELD_OUT_GROUP
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.ranks import Ranks
from eigenslice.stream.walk import Site

LOGITS = 2**24
"""Logits that are held at once."""


@dataclass(frozen=True)
class Head:
    """Logits from the normalized stream, scale * (x W^T + b).

    Attributes:
        weight: W, (vocabulary, width), float32; the final norm's gain is in it.
        bias: b, (vocabulary,), float32, or None.
        scale: The config's.
        cap: The config's bound of the logits (Gemma's c * tanh(logits / c)), or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """(n, vocabulary), from rows (n, width); without the bound."""
        logits = rows @ self.weight.T
        return self.scale * (logits if self.bias is None else logits + self.bias)

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """Log probabilities of the next tokens (n, vocabulary), from rows (n, width)."""
        logits = self.logits(rows)
        return (logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)).log_softmax(-1)

    @property
    def at_once(self) -> int:
        """Number of tokens whose logits are in memory at once."""
        return max(1, LOGITS // len(self.weight))


def dense_head(dense: DenseModel) -> Head:
    """Return the dense model's head."""
    rows, bias = dense.lm_head()
    return Head(rows.to(torch.float32), None if bias is None else bias.float(), _scale(dense), _cap(dense))


def sliced_head(dense: DenseModel, cut: GlobalCut, reading: Tensor | None) -> Head:
    """Return a sliced model's head; it doesn't depend on the class that the model is saved as.

    Args:
        dense: The dense model.
        cut: The plan and the basis of the sliced model.
        reading: The untied head's map from the sliced stream to dense coordinates, (D, width); None takes the basis.
    """
    plan, basis = cut.plan, cut.basis
    head, norm = dense.table.lm_head, dense.table.final_norm
    custom = replace(plan, stock=None)  # another class computes the same
    tensors = dict(slice_head(dense, custom, basis.site, basis.tied_gain, torch.float32, reading))
    if plan.tied:
        embeddings = dict(slice_embeddings(dense, plan, basis.site, torch.float32))
        weight = embeddings[dense.table.embeddings[0] + ".weight"] * tensors[norm + ".weight"].float()
    else:
        weight = tensors[head + ".weight"]
    bias = tensors.get(head + ".bias")
    return Head(weight, None if bias is None else bias.float(), _scale(dense), _cap(dense))


def _scale(dense: DenseModel) -> float:
    """Return the factor of the logits in the config."""
    return dense.table.logit_scale(dense.config) if dense.table.logit_scale else 1.0


def _cap(dense: DenseModel) -> float | None:
    """Return the bound of the logits in the config; None where there is none."""
    return getattr(dense.config, "final_logit_softcapping", None)


def held_out_rows(
    site: Site, streams: Sequence[OffloadedTensors], at_once: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield normalized rows of held-out tokens at the site before the head, dense (n, D) and sliced.

    Args:
        site: The site before the head.
        streams: The sliced streams there.
        at_once: Number of rows that are yielded together.
    """
    for number, batch in enumerate(site.activations):
        if batch.group == HELD_OUT_GROUP:
            rows = batch.rows(normalize(batch.hidden, site.eps))
            others = [batch.rows(normalize(stream[number], site.eps)) for stream in streams]
            for start in range(0, len(rows), at_once):
                part = slice(start, start + at_once)
                yield rows[part], [other[part] for other in others]


def divergences(
    whole: Head, site: Site, streams: Sequence[OffloadedTensors], heads: Sequence[Head], ranks: Ranks
) -> list[float]:
    """Measure KL(dense || sliced) at the site before the head, in nats per held-out token of all ranks.

    Args:
        whole: The dense model's head.
        site: The site before the head.
        streams: The sliced models' streams there.
        heads: The sliced models' heads.
        ranks: The processes that share the sequences.
    """
    totals = torch.zeros(len(streams) + 1, dtype=torch.float64, device=whole.weight.device)  # and the number of tokens
    for rows, others in held_out_rows(site, streams, whole.at_once):
        totals[-1] += len(rows)
        expected = whole.log_probabilities(rows)
        for index, (head, other) in enumerate(zip(heads, others, strict=True)):
            actual = head.log_probabilities(other)
            totals[index] += (expected.exp() * (expected - actual)).sum(-1).double().sum()
    *losses, tokens = ranks.decide(ranks.sum(totals)).tolist()
    return [loss / tokens for loss in losses]
