"""Memory that activations and a whole model take, in bytes."""

import torch

from eigenslice.fit.neuron_readers import curvature_stride
from eigenslice.model.dense import DenseModel

LITTLE_MEMORY = 1024**3
"""Bytes that a model may take as a whole in any case."""
WRITING = 3.5
"""Time of a token that the model writes, over that of one it reads: measured on SmolLM2-135M, on 2 CPU cores."""


def activation_bytes(dense: DenseModel, tokens: int, dtype: torch.dtype, *, refitted: bool = False) -> int:
    """Bytes of the activations that live at once: two streams, and what the widest writers read.

    Where layers are refitted, what MLP neurons read and the slopes of what they make of it, too, at some of the tokens.
    """
    item = torch.empty((), dtype=dtype).element_size()
    inner = 0 if dense.expert_count else dense.neuron_count  # what experts write is kept, not what their writers read
    read = (dense.width + dense.neuron_rows) / curvature_stride(tokens) if refitted and dense.neuron_rows else 0
    return int(tokens * (2 * dense.width + max(dense.width, inner) + read)) * item


def whole_bytes(dense: DenseModel, dtype: torch.dtype) -> int:
    """Bytes of the weights of the model as transformers loads it, together with what reads images beside the text."""
    source, parameters = dense.source, dense.parameters
    if source.whole is not None:
        parameters = sum(torch.Size(source.weights.shape(name)).numel() for name in source.weights.names())
    return parameters * dtype.itemsize


def room_for_model(dense: DenseModel, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the whole model may take to write text, unless it was asked for: no more than slicing takes."""
    return max(LITTLE_MEMORY, activation_bytes(dense, tokens, dtype))
