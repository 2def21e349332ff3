"""Batches of sequences, and the groups that sequences belong to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigenslice.runtime.ranks import Ranks

BESIDE_GROUP = -2
"""Group of sequences beside the texts: layers are fitted on them, too, but no basis or ridge is chosen by them."""
HELD_OUT_GROUP = -1
"""Group of held-out sequences: no layer is fitted on them, so their errors show the error on unseen text."""


@dataclass(frozen=True)
class Batch:
    """Calibration sequences of one length.

    Attributes:
        input_ids: Token ids, (B, T).
        attention_mask: 0 for padding, (B, T); None without padding.
        group: Number of the sequences' text, or of a part of the text. A fit on some groups is tried on other groups.
        own: True if the dense model wrote the sequences. The reported loss is measured on texts only.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    group: int = 0
    own: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def predicted(self) -> Tensor:
        """Whether a token and the next token count, (B, T - 1), so that the next token can be predicted."""
        mask = self.attention_mask
        if mask is None:
            return torch.ones_like(self.input_ids[:, 1:], dtype=torch.bool)
        return (mask[:, 1:] * mask[:, :-1]).bool()


def share_batches(batches: list[Batch], ranks: Ranks) -> list[Batch]:
    """A rank's sequences: of N ranks, every N-th."""
    shared, first = [], 0
    for batch in batches:
        rows = slice((ranks.rank - first) % ranks.size, None, ranks.size)
        first += len(batch.input_ids)
        if len(batch.input_ids[rows]):
            mask = None if batch.attention_mask is None else batch.attention_mask[rows]
            shared.append(replace(batch, input_ids=batch.input_ids[rows], attention_mask=mask))
    return shared
