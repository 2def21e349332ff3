"""Processes that share the calibration sequences: several under torchrun, otherwise this one alone.

Each process runs the model over its own sequences. Sums over tokens become sums over all ranks. The first rank decides
everything that follows from the sums, so that rounding on unlike devices can't separate the ranks.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eigenslice.errors import (
    EchoedError,
    EigensliceError,
    EigensliceWarning,
    IncompleteError,
    MemoryRanOutError,
    RankError,
    first_line,
)

CPU = torch.device("cpu")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch's backends by the kind of device. Weights of a training may lie on the host beside a GPU."""
LONGEST_WAIT = timedelta(hours=24)
"""Time that ranks wait for each other: the first one hashes files, writes text and checks results alone."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: The process's device; gloo sums on the CPU, NCCL on the GPU.
        local_rank: Number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """True for the process that writes."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """True for one process of each machine."""
        return self.local_rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        return tensor if self.size == 1 else self._call(lambda: dist.all_reduce(tensor), tensor)

    def decide(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in place of all others'."""
        return tensor if self.size == 1 else self._call(lambda: dist.broadcast(tensor, 0), tensor)

    def wait(self) -> None:
        """Until all are here."""
        self.sum(torch.zeros(1, device=self.device))

    def on_first(self, do: Callable[[], Any]) -> Any:
        """Let the first rank do something and give all its result, or its error.

        Args:
            do: Returns something that JSON can hold.
        """
        if self.size == 1:
            return do()
        answer: dict[str, Any] = {}
        error: BaseException | None = None
        if self.first:
            try:
                answer = {"result": do()}
            except EigensliceError as caught:
                error = caught
                answer = {"found": caught.found, "allowed": caught.allowed, "next_step": caught.next_step}
                answer["is_lasting"] = is_lasting(caught)
            except OSError as caught:
                error = caught
                answer = {"found": str(caught), "allowed": "no such failure on the first rank", "next_step": "see it"}
        text = self._broadcast_text(json.dumps(answer))
        if error is not None:
            raise error
        answer = json.loads(text)
        if "result" not in answer:
            echo = EchoedError(answer["found"], allowed=answer["allowed"], next_step=answer["next_step"])
            echo.is_lasting = answer.get("is_lasting", False)
            raise echo
        return answer["result"]

    def on_all(self, do: Callable[[], None]) -> None:
        """Let each rank do something. If one fails, all do.

        Raises:
            EchoedError: another rank has failed.
        """
        error: BaseException | None = None
        try:
            do()
        except (EigensliceError, OSError) as caught:
            error = caught
        failed = self._largest(self.size - self.rank if error else 0)
        if error is not None:
            raise error
        if failed:
            raise EchoedError(
                f"rank {self.size - failed} of {self.size} has failed",
                allowed="all ranks running to the end",
                next_step="see what that rank printed",
            )

    def in_turns(self, do: Callable[[], None]) -> None:
        """Let the ranks of each machine do something one after the other. If one fails, all do.

        Raises:
            EchoedError: another rank has failed.
        """
        for turn in range(self._largest(self.local_rank) + 1):
            self.on_all(do if turn == self.local_rank else _nothing)

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors, by name, on the CPU. The files of other ranks may be on other machines."""
        if self.size == 1:
            return dict(tensors)
        kinds = self.on_first(lambda: [[name, list(t.shape), str(t.dtype)[6:]] for name, t in tensors.items()])
        return {name: self._shared(tensors.get(name), shape, getattr(torch, dtype)) for name, shape, dtype in kinds}

    def _shared(self, tensor: Tensor | None, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The first rank's tensor, as bytes on their way."""
        count = math.prod(shape) * dtype.itemsize
        data = torch.zeros(count, dtype=torch.uint8, device=self.device)
        if self.first and tensor is not None and count:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).to(self.device)
        return (self.decide(data) if count else data).cpu().view(dtype).reshape(shape)

    def _largest(self, number: int) -> int:
        largest = torch.tensor([number], device=self.device)
        if self.size > 1:
            self._call(lambda: dist.all_reduce(largest, dist.ReduceOp.MAX), largest)
        return int(largest)

    def _broadcast_text(self, text: str) -> str:
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = self.decide(torch.tensor([len(data)], device=self.device))
        if not self.first:
            data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        return bytes(self.decide(data).tolist()).decode()

    def _call(self, collective: Callable[[], Any], tensor: Tensor) -> Tensor:
        try:
            collective()
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} lost the others ({first_line(error)})",
                allowed="all ranks running to the end",
                next_step="see what the rank that failed first printed, then run the same command with --resume",
            ) from error
        return tensor


def _nothing() -> None:
    """It is another rank's turn."""


ALONE = Ranks()
"""One process, on the CPU or on a GPU: sums and decisions are its own."""


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun has started; without it, this process alone.

    Args:
        device: Where this process computes.
    """
    if not all(name in os.environ for name in TORCHRUN) or int(os.environ["WORLD_SIZE"]) == 1:
        gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        if gpus > 1 and device.index is None:
            warnings.warn(
                f"One of {gpus} GPUs works. torchrun --nproc-per-node {gpus} -m eigenslice slice ... uses all of them, "
                "--device cuda:0 says nothing.",
                EigensliceWarning,
                stacklevel=2,
            )
        yield Ranks(device=device)
        return
    if dist.is_initialized():  # by a run that this one is a part of
        yield _joined(device)
        return
    dist.init_process_group(_backend(device), timeout=LONGEST_WAIT)
    try:
        yield _joined(device)
    finally:
        dist.destroy_process_group()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """torch's group of processes, which a process without peers has inside of this context alone.

    Args:
        device: Where this process computes.
    """
    if dist.is_initialized():
        yield
        return
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]: documented, and not in torch's list
    dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return BACKENDS.get(device.type, "gloo")


def _joined(device: torch.device) -> Ranks:
    """This process among those that torchrun has started."""
    return Ranks(dist.get_rank(), dist.get_world_size(), device, int(os.environ["LOCAL_RANK"]))


def is_lasting(error: BaseException) -> bool:
    """Return whether running the same command again would fail in the same way."""
    if isinstance(error, EchoedError):
        return error.is_lasting
    return isinstance(error, EigensliceError) and not isinstance(error, IncompleteError | MemoryRanOutError | RankError)
