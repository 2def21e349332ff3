"""The memory that slicing takes, on the device and on the host, and the option that makes it fit."""

from dataclasses import dataclass

import psutil
import torch

from eigenslice.fit.working_memory import working_bytes
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import Place, choose_place, free_bytes
from eigenslice.slicing.memory import activation_bytes, room_for_model, whole_bytes

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """Peak memory, in bytes.

    Attributes:
        host: Memory of the host, this process's included.
        device: Memory of the GPU; 0 without one.
    """

    host: int
    device: int


@dataclass(frozen=True)
class MemoryNeed:
    """The memory of a run.

    Attributes:
        plain: Without refit: `working_bytes`, and the activations.
        refitted: With refit: the same; or the whole model, which writes text; or the head in float32, beside two
            streams.
        place: The place of the activations.
        activations: Their bytes, with refit.
    """

    plain: Memory
    refitted: Memory
    place: Place
    activations: int

    def advice(self, device: torch.device) -> list[str]:
        """Return what doesn't fit into the memory that is free now, and the option that makes it fit."""
        lines = []
        if device.type == "cuda" and self.refitted.device > (free := free_bytes(device)):
            way = "--no-refit fits" if self.plain.device <= free else "a GPU with more memory, or --device cpu"
            lines.append(f"{_gigabytes(self.refitted.device)} of device memory, {_gigabytes(free)} free: {way}")
        free = free_bytes(HOST) + psutil.Process().memory_info().rss
        if self.refitted.host > free:
            on_host = self.place == "host" or (self.place == "device" and device.type != "cuda")
            way = "--no-refit fits" if self.plain.host <= free else "a machine with more memory"
            if on_host and self.refitted.host - self.activations <= free:
                way = "--offload disk, or fewer --samples"
            lines.append(f"{_gigabytes(self.refitted.host)} of host memory, {_gigabytes(free)} free: {way}")
        return lines


def memory_need(dense: DenseModel, tokens: int, dtype: torch.dtype, passing: int | None = None) -> MemoryNeed:
    """Count the memory of slicing on the model's device.

    Args:
        dense: The model.
        tokens: Tokens of the calibration texts.
        dtype: The dtype of the forward pass.
        passing: Tokens that pass with refit, the model's own text and beginnings included; None is `tokens`.
    """
    passing = passing or tokens
    anatomy, device, on_gpu = dense.anatomy, dense.device, dense.device.type == "cuda"
    rss = psutil.Process().memory_info().rss
    activations = activation_bytes(anatomy, tokens, dtype)
    all_activations = activation_bytes(anatomy, passing, dtype, refitted=True)
    computing, fitting = (working_bytes(anatomy, dtype, anatomy.neuron_count, twins) for twins in (0, 1))
    place = choose_place("auto", all_activations, device, fitting)
    streams = 2 * passing * anatomy.width * dtype.itemsize
    whole = whole_bytes(dense, dtype)
    writes = whole <= room_for_model(device)
    head = anatomy.tokens * anatomy.width * 4 + (streams if place == "device" else 0)
    held = {"plain": activations // 2, "refitted": all_activations}
    if not on_gpu:
        if place == "disk":
            held = dict.fromkeys(held, 0)
        refitted = max(held["refitted"] + fitting, head, whole if writes else 0)
        return MemoryNeed(
            Memory(rss + held["plain"] + computing, 0),
            Memory(rss + refitted, 0),
            place,
            held["refitted"],
        )
    reading = 2 * max(anatomy.block_sizes) * dense.dtype.itemsize
    there = {name: size if place == "device" else 0 for name, size in held.items()}
    here = {name: size if place == "host" else 0 for name, size in held.items()}
    refitted = max(fitting + there["refitted"], head, whole if writes else 0)
    return MemoryNeed(
        Memory(rss + reading + here["plain"], computing + there["plain"]),
        Memory(rss + reading + here["refitted"], refitted),
        place,
        held["refitted"],
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
