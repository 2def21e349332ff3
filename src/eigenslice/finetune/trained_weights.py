"""The weights that are trained: all of them where the memory is enough, or else adapters."""

from typing import Any

import torch

from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.runtime.offload import free_bytes
from eigenslice.runtime.ranks import Ranks

BYTES = 16
"""Bytes of a weight that is trained: itself, its gradient and two numbers of AdamW, in float32."""
LOGITS = 3
"""Float32 numbers for each logit of a micro-batch: the model's, the teacher's and the gradient."""
FREE = 0.8
"""Share of the free memory that a training may take; the rest is for activations."""


def training_bytes(model: Any, teacher: Any, options: FinetuneOptions) -> int:
    """Return the bytes that training all weights takes, without the activations.

    Args:
        model: The model.
        teacher: The dense model, or None.
        options: The options of the command.
    """
    vocabulary = model.config.get_text_config().vocab_size
    logits = options.micro_batch * options.data.seqlen * vocabulary * LOGITS * torch.float32.itemsize
    of_teacher = sum(p.numel() * p.element_size() for p in teacher.parameters()) if teacher is not None else 0
    return BYTES * sum(p.numel() for p in model.parameters()) + of_teacher + logits


def with_weights_chosen(options: FinetuneOptions, model: Any, teacher: Any, ranks: Ranks) -> FinetuneOptions:
    """Return the options with `full` decided: all weights, if the memory of the first rank's device is enough.

    Args:
        options: The options of the command.
        model: The model, on the CPU.
        teacher: The dense model on the CPU, or None.
        ranks: The processes.
    """
    if options.full is not None:
        return options
    loaded = sum(p.numel() * p.element_size() for m in (model, teacher) if m is not None for p in m.parameters())
    here = loaded if ranks.device.type == "cpu" else 0  # what is in memory already doesn't come once more
    room = FREE * (free_bytes(ranks.device) + here)
    fits = ranks.on_first(lambda: not options.keep_adapter and training_bytes(model, teacher, options) <= room)
    return type(options)(**options.model_dump() | {"full": fits})
