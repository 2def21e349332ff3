"""Choosing the torch device."""

import ctypes
import gc
import os
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from eigenslice.errors import OptionsError, first_line

MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h: allocations of so many bytes have pages of their own."""
UNMAPPED = 4 * 1024**2
"""Size of such tensors, in bytes. With a fourth of it, a refit takes more time and hardly less memory."""


def resolve_device(name: str | None) -> torch.device:
    """The device of a name; without one, a GPU if there is one.

    Of several processes on this machine that torchrun has started, each has a GPU of its own.

    Raises:
        OptionsError: there is no such device here, or it can't compute in float64; or processes would share a GPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        name = _own_gpu(name, int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("its tensors have no numbers")
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError, TypeError and its own
        raise OptionsError(
            f"--device {name} can't be used ({first_line(error)})",
            allowed="cpu" + (", cuda, cuda:0, ..." if torch.cuda.is_available() else "; torch sees no GPU here"),
            next_step="choose one of these, or leave --device out",
        ) from error
    return device


def _own_gpu(name: str, rank: int, gpus: int) -> str:
    """The GPU of one of several processes on a machine, which becomes torch's (and NCCL's) current one."""
    if name != "cuda" or rank >= gpus:
        raise OptionsError(
            f"--device {name} in process {rank} of this machine, which has {gpus} GPUs",
            allowed="one process for each GPU, and --device cuda or none: each takes its own",
            next_step="leave --device out; torchrun --nproc-per-node has to be the number of GPUs or less",
        )
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def device_of(model: Any) -> torch.device:
    """The device that a model computes on. Weights that processes share (FSDP2) may lie elsewhere, on the host."""
    first = next(iter(model.parameters()))
    mesh = getattr(first, "device_mesh", None)
    if mesh is None or mesh.device_type != "cuda":
        return first.device
    return torch.device("cuda", torch.cuda.current_device())


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device in a dtype. The narrower dtype crosses the bus.

    torch's own `tensor.to(device, dtype)` converts on the host what goes to a GPU. Of weights in bfloat16 that are
    computed with in float64, four times as many bytes would cross.
    """
    if dtype.itemsize < tensor.element_size():
        tensor = tensor.to(dtype)
    return tensor.to(device).to(dtype)


def trim_memory() -> None:
    """Give freed memory back to the system, if the C library is glibc.

    By itself, glibc keeps the holes between tensors, and seldom finds a hole large enough for the next tensor. Memory
    would grow with every block. A call takes less than a millisecond.
    """
    _call_glibc("malloc_trim", 0)


def give_memory_back(device: torch.device) -> None:
    """Give memory that a whole model took back to the device and to the system.

    torch keeps freed memory of a GPU, and others then see it as taken: other processes, and who asks how much is free.
    Models refer to themselves, so that Python has to look for them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_memory()


def unmap_freed_tensors() -> None:
    """From now on, let tensors of 4 MiB and more go back to the system as soon as they are freed, where it is glibc.

    This holds for the whole process until it ends. By itself, glibc keeps tensors of up to 32 MiB until `trim_memory`.
    A refit of width 1024 takes a sixth less memory this way, and a seventh more time.
    """
    _call_glibc("mallopt", MMAP_THRESHOLD, UNMAPPED)


def _call_glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
