"""An estimate of a run's time and memory, before it begins."""

from dataclasses import dataclass

import torch

from eigenslice.inspection.healing_need import HealingMemory, healing_memory
from eigenslice.inspection.memory_need import Memory, MemoryNeed, memory_need
from eigenslice.inspection.probe import Probe, faster_of_two
from eigenslice.inspection.work import measuring_work, passing_tokens, work_by_stage
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import OWN_SHARE
from eigenslice.slicing.memory import WRITING, room_for_model, whole_bytes

HEALED_TOKENS = 100_000
"""Tokens of the healing that is estimated."""
BUS_PROBE = 64 * 1024**2
"""Bytes of the copy that is timed."""
PASSES = 5
"""Passes of the dense model in which weights cross the bus: measuring, depth, two of trials, and the last one."""
STREAMS_OF_A_BLOCK = 12
"""Streams that cross the bus for a block where activations live on the host: 8 up and 4 down."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of slicing with so many calibration tokens on this machine.

    Attributes:
        tokens: Number of calibration tokens.
        seconds: Time with a global basis and no refit: one pass of the dense model, its covariances, and writing.
        refitted_seconds: Time with text that the model writes, plans tried and layers refitted (`--keep`).
        stage_seconds: The parts of `refitted_seconds`, by the stage of the run.
        bus_seconds: The part in which weights and activations cross to a GPU and back, if nothing else goes on
            meanwhile.
        memory: Peak memory without refit.
        refitted_memory: Peak memory with refit.
        advice: What doesn't fit into the free memory, and which option makes it fit.
        healing_seconds: Time of healing on `HEALED_TOKENS` tokens, with all weights.
        healing_memory: Peak memory of healing.
    """

    tokens: int
    seconds: float
    refitted_seconds: float
    stage_seconds: dict[str, float]
    bus_seconds: float
    memory: Memory
    refitted_memory: Memory
    advice: list[str]
    healing_seconds: float
    healing_memory: HealingMemory


def estimate(dense: DenseModel, tokens: int, seqlen: int, dtype: torch.dtype = torch.float32) -> Estimate:
    """Time parts of the work on this machine, and count how often a run does each.

    Args:
        dense: The model.
        tokens: Calibration tokens.
        seqlen: Tokens per sequence; attention grows with it.
        dtype: The dtype of the forward pass.
    """
    anatomy, probe = dense.anatomy, Probe.of(dense, seqlen, dtype)
    write = anatomy.block_count * probe.fold * 3  # folded to be run; folded again to be sliced, and written
    whole = whole_bytes(dense, dtype)
    writes = whole <= room_for_model(dense.device)
    stages = work_by_stage(anatomy, tokens, writes=writes)
    seconds = {stage: probe.seconds(work) for stage, work in stages.items()}
    passing = passing_tokens(tokens, writes=writes)
    need = memory_need(dense, tokens, dtype, passing)
    bus = _bus_seconds(dense, passing, dtype, need)
    return Estimate(
        tokens=tokens,
        seconds=probe.seconds(measuring_work(anatomy, tokens)) + write,
        refitted_seconds=sum(seconds.values()) + write + bus,
        stage_seconds=seconds,
        bus_seconds=bus,
        memory=need.plain,
        refitted_memory=need.refitted,
        advice=need.advice(dense.device),
        healing_seconds=_healing_seconds(anatomy, probe),
        healing_memory=healing_memory(anatomy, whole, dtype),
    )


def _bus_seconds(dense: DenseModel, tokens: int, dtype: torch.dtype, need: MemoryNeed) -> float:
    """Return the time of copies to a GPU and back: weights in each pass, and activations that live on the host."""
    if dense.device.type != "cuda":
        return 0.0
    piece = torch.empty(BUS_PROBE, dtype=torch.uint8)
    rate = BUS_PROBE / faster_of_two(lambda: piece.to(dense.device), dense.device)
    weights = PASSES * dense.anatomy.parameters * dense.dtype.itemsize
    streams = 0 if need.place == "device" else tokens * dense.anatomy.width * dtype.itemsize
    return (weights + STREAMS_OF_A_BLOCK * dense.anatomy.block_count * streams) / rate


def _healing_seconds(anatomy: Anatomy, probe: Probe) -> float:
    """Return the time of healing: the dense model runs forward, the sliced one forward and backward.

    A backward pass takes two forward passes. A part of the tokens is written by the dense model first.
    """
    forward = anatomy.block_count * probe.block
    written = OWN_SHARE / (1 + OWN_SHARE) * WRITING * forward
    return HEALED_TOKENS / probe.tokens * (4 * (forward + probe.head) + written)
