"""Costs of a model: operations, bytes to read, bytes on disk, memory."""

import multiprocessing
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eigenslice.checkpoint.adapters import ADAPTER_WEIGHTS
from eigenslice.checkpoint.source import locate
from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.errors import CheckpointError, first_line


def weight_bytes_on_disk(name: str) -> int:
    """Size of the weight files of a folder, hub id or .gguf file, in bytes; an adapter beside them counts."""
    folder, gguf = locate(name, adapters=True)
    files = (folder / gguf,) if gguf else (*SafetensorsWeights(folder).files, *folder.glob(ADAPTER_WEIGHTS))
    return sum(file.stat().st_size for file in files)


def operations(forward: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in a call, attention included, a multiply-add counted as two."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels aren't counted on CPU
        forward()
    return counter.get_total_flops()


def bytes_per_step(model: Any, cache: Any, tokens: float, length: int) -> int:
    """Bytes that one decoding step has to read: all weights but the rows of an embedding, and the cache.

    Args:
        model: The model. A tied head reads the embedding's matrix, which then counts.
        cache: Its cache, filled with `length` tokens.
        tokens: Number of tokens in the cache at the step.
        length: Tokens that the cache holds.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())  # shared parameters are listed once
    if head is not embedding:
        weights -= embedding.numel() * embedding.element_size()
    parts: list[Tensor] = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return weights + int(sum(p.numel() * p.element_size() for p in parts) * tokens / length)


def peak_memory(work: Callable[..., None], *arguments: Any) -> int:
    """Largest resident memory, in bytes, of a fresh process that does some work.

    Raises:
        CheckpointError: it doesn't come to its end, such as where memory ends.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments), daemon=True)
    with _deaf():
        process.start()
    sender.close()
    try:
        peak_or_error = receiver.recv()
    except EOFError:
        peak_or_error = "it was ended from outside: memory may have run out"
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(peak_or_error, str):
        raise CheckpointError(
            f"the process that memory was measured in failed ({peak_or_error})",
            allowed="models that fit into memory once more, beside what is measured here",
            next_step="pass --no-memory",
        )
    return peak_or_error


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _measured(sender: Any, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
        peak_or_error: int | str = _high_water_mark()
    except BaseException as error:  # told by the process that waits, without a traceback
        peak_or_error = first_line(error)
    sender.send(peak_or_error)


def _high_water_mark() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss may hold the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
