"""A sliced model's logits beside the dense model's, on sequences that nothing was fitted on.

On the tokens that its layers were fitted on, a sliced model looks better than on other text. So plans are compared on
held-out sequences, and the gain before the head is fitted on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eigenslice.algebra.covariance import normalize
from eigenslice.cut.ends import GlobalCut
from eigenslice.data.batches import HELD_OUT_GROUP
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.device import trim_memory
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.ranks import Ranks
from eigenslice.stream.walk import Site

LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Logits that are held at once, by the kind of device. On CPU they stay in the cache (2.8 times as fast as 2**24)."""
EVERY = slice(None)
ROWS = 2048
"""Tokens whose logits are computed together. Each part of a large head is read once for all of them."""


@dataclass(frozen=True)
class Head:
    """Logits from the normalized stream, scale * (x R^T W^T + b).

    W is the largest matrix of many models. So the heads of all models that are compared share it, as it is stored, and
    differ in R.

    Attributes:
        weight: W, (vocabulary, D), float32.
        reading: R, which brings rows to W's coordinates: a matrix (D, width), or the diagonal of one, (D,); float32.
        bias: b, (vocabulary,), float32, or None.
        scale: The config's.
        cap: The config's bound of the logits (Gemma's c * tanh(logits / c)), or None.
    """

    weight: Tensor
    reading: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None = None

    def read(self, rows: Tensor) -> Tensor:
        """Return rows x R^T in W's coordinates, (n, D), from rows x (n, width)."""
        return rows * self.reading if self.reading.dim() == 1 else rows @ self.reading.T

    def read_back(self, rows: Tensor) -> Tensor:
        """Return rows y R, (n, width), from rows y (n, D): the gradient's way back through `read`."""
        return rows * self.reading if self.reading.dim() == 1 else rows @ self.reading

    def parts(self, rows: int) -> list[slice]:
        """Return parts of the vocabulary of which `LOGITS` logits of so many rows are held at once."""
        size, vocabulary = max(1, LOGITS.get(self.weight.device.type, LOGITS["cuda"]) // max(1, rows)), len(self.weight)
        return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]

    def logits(self, rows: Tensor, part: slice = EVERY, *, bounded: bool = True) -> Tensor:
        """Return logits of a part of the vocabulary, (n, part), from read rows (n, D), with the bound or without it."""
        logits = rows @ self.weight[part].T
        logits = self.scale * (logits if self.bias is None else logits + self.bias[part])
        return self._bound(logits) if bounded else logits

    def chosen_logits(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return one logit of each row, (n,), from read rows (n, D) and the tokens' ids (n,)."""
        logits = torch.linalg.vecdot(rows, self.weight[ids])
        return self._bound(self.scale * (logits if self.bias is None else logits + self.bias[ids]))

    def _bound(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def log_total(self, rows: Tensor, *, bounded: bool = True) -> Tensor:
        """Return the logarithm of the sum of exp(logits) over the vocabulary, (n,), from read rows (n, D)."""
        total = rows.new_full((len(rows),), -torch.inf)
        for part in self.parts(len(rows)):
            total = torch.logaddexp(total, self.logits(rows, part, bounded=bounded).logsumexp(-1))
        return total


def make_heads(dense: DenseModel, cuts: Sequence[tuple[GlobalCut, Tensor | None]] = ()) -> tuple[Head, list[Head]]:
    """Return the dense model's head and those of sliced models, which share the vocabulary's matrix.

    The heads don't depend on the classes that the models are saved as.

    Args:
        dense: The dense model.
        cuts: For each sliced model its plan and basis, and an untied head's map from the sliced stream to dense
            coordinates, (D, width); None takes the basis.
    """
    trim_memory()  # what fits have left is in the way of the matrix
    gain = dense.final_gain()

    def sliced(cut: GlobalCut, reading: Tensor | None) -> Tensor:
        basis, tied_gain = cut.basis.site, cut.basis.tied_gain
        if tied_gain is not None:  # the rows are the embedding's, too, and the norm's gain is behind the basis
            return basis.reading * tied_gain
        return gain[:, None] * (basis.reading if reading is None else reading)

    matrix, bias = dense.stored_head()
    bias = None if bias is None else bias.float()
    scale = dense.table.logit_scale(dense.config) if dense.table.logit_scale else 1.0
    cap = getattr(dense.config, "final_logit_softcapping", None)
    readings = (gain, *(sliced(*cut) for cut in cuts))
    whole, *heads = (Head(matrix, reading.float(), bias, scale, cap) for reading in readings)
    return whole, heads


def held_out_rows(site: Site, streams: Sequence[OffloadedTensors]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield normalized rows of held-out tokens at the site before the head, dense (n, D) and sliced, n at most `ROWS`.

    Args:
        site: The site before the head.
        streams: The sliced streams there.
    """
    for number, batch in enumerate(site.activations):
        if batch.group == HELD_OUT_GROUP:
            rows = batch.rows(normalize(batch.hidden, site.eps))
            others = [batch.rows(normalize(stream[number], site.eps)) for stream in streams]
            for start in range(0, len(rows), ROWS):
                part = slice(start, start + ROWS)
                yield rows[part], [other[part] for other in others]


def kl_of_rows(whole: Head, rows: Tensor, heads: Sequence[Head], others: Sequence[Tensor]) -> list[Tensor]:
    """Return KL(dense || sliced) of each row for several sliced models, (n,) each, in nats.

    KL = sum of p (l - m) + log sum of exp(m) - log sum of exp(l). The dense model has the logits l and the
    probabilities p, the sliced model has the logits m. The sums go over parts of the vocabulary, so that a large
    vocabulary's logits are never held as a whole.

    Args:
        whole: The dense model's head.
        rows: Its rows, (n, D).
        heads: The sliced models' heads.
        others: Their rows, (n, width) each.
    """
    rows, others = whole.read(rows), [head.read(other) for head, other in zip(heads, others, strict=True)]
    total = whole.log_total(rows)
    differences = [torch.zeros_like(total) for _ in heads]
    totals = [torch.full_like(total, -torch.inf) for _ in heads]
    for part in whole.parts(len(rows)):
        dense = whole.logits(rows, part)
        p = (dense - total[:, None]).exp_()
        for index, (head, other) in enumerate(zip(heads, others, strict=True)):
            logits = head.logits(other, part)
            totals[index] = torch.logaddexp(totals[index], logits.logsumexp(-1))
            differences[index] += torch.linalg.vecdot(p, dense - logits)
    return [difference + of - total for difference, of in zip(differences, totals, strict=True)]


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
    for rows, others in held_out_rows(site, streams):
        totals[-1] += len(rows)
        for index, kl in enumerate(kl_of_rows(whole, rows, heads, others)):
            totals[index] += kl.double().sum()
    *losses, tokens = ranks.decide(ranks.sum(totals)).tolist()
    return [loss / tokens for loss in losses]
