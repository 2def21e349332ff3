"""The memory of healing: on one device, on several that share the weights, and with the weights on the host."""

from dataclasses import dataclass

import psutil
import torch

from eigenslice.inspection.memory_need import Memory
from eigenslice.model.anatomy import Anatomy
from eigenslice.slicing.memory import gathered_numbers, shared_training_bytes, training_bytes

HEALED_WINDOW = 512
"""Tokens of a window."""
DEVICES = (2, 4, 8)
"""Numbers of devices that the weights may be shared among."""


@dataclass(frozen=True)
class HealingMemory:
    """Peak memory of healing, in bytes, this process's included and without the activations.

    Attributes:
        whole: All weights on one device.
        shared: All weights, on each of several devices that share them, by their number.
        adapters: LoRA adapters on one device, without the adapters themselves.
        on_host: Adapters, with all other weights on the host (`finetune --place host`).
    """

    whole: int
    shared: dict[int, int]
    adapters: int
    on_host: Memory


def healing_memory(anatomy: Anatomy, teacher: int, dtype: torch.dtype) -> HealingMemory:
    """Count the memory of healing.

    Args:
        anatomy: The dense model's anatomy; the sliced model is smaller.
        teacher: Bytes of the dense model.
        dtype: The dtype of the forward pass, and of weights that aren't trained.
    """
    rss = psutil.Process().memory_info().rss
    held = training_bytes(anatomy.parameters, teacher, 0, 0)
    passing = training_bytes(0, 0, HEALED_WINDOW, anatomy.tokens)
    gathered = gathered_numbers(max(anatomy.block_sizes), sum(anatomy.vocabulary_parameters.values())) * dtype.itemsize
    still = anatomy.parameters * dtype.itemsize + teacher
    return HealingMemory(
        whole=rss + shared_training_bytes(held, passing, gathered, 1),
        shared={n: rss + shared_training_bytes(held, passing, gathered, n) for n in DEVICES},
        adapters=rss + passing + still,
        on_host=Memory(rss + still, passing + gathered),
    )
