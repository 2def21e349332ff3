"""What a run will take, before it begins."""

import torch

from eigenslice.data import Tokens
from eigenslice.dense import DenseModel


def activation_bytes(dense: DenseModel, tokens: Tokens, dtype: torch.dtype) -> int:
    """Bytes of the activations that live at once: two streams, and what the widest writers read."""
    item = torch.empty((), dtype=dtype).element_size()
    return tokens.count * (2 * dense.width + max(dense.width, dense.neurons)) * item
