"""What is trained, and where it lies: all weights or adapters, on each device, shared among devices, or on the host."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from eigenslice.checkpoint.writer import GIB
from eigenslice.errors import OptionsError
from eigenslice.options.finetuning import FinetuneOptions, WeightsPlace
from eigenslice.runtime.offload import free_bytes
from eigenslice.runtime.ranks import Ranks
from eigenslice.slicing.memory import gathered_numbers, shared_training_bytes, training_bytes

FREE = 0.8
"""Share of the free memory that a training may take; the rest is for activations."""
MOST = 4096
"""Most processes that are proposed."""
HOST = torch.device("cpu")
Way = tuple[bool, WeightsPlace]
"""Whether all weights are trained, and where they lie."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a training needs.

    Attributes:
        all_weights: The weights, their gradients, the optimizer and the teacher.
        adapters: The same where adapters are trained, without the adapters themselves.
        passing: The logits of the windows that pass at once.
        gathered: The weights that are on a device at once where they are shared, or lie on the host.
    """

    all_weights: int
    adapters: int
    passing: int
    gathered: int

    @classmethod
    def of(cls, options: FinetuneOptions, parameters: int, teacher: int, config: Any, frozen: int) -> "Needs":
        """Count them.

        Args:
            options: The options of the command.
            parameters: Number of the model's weights.
            teacher: Number of the teacher's weights, 0 without one.
            config: The model's config.
            frozen: Bytes of a number that isn't trained.
        """
        text = config.get_text_config()
        outside = 2 * text.vocab_size * text.hidden_size
        block = max(parameters, teacher) // text.num_hidden_layers
        return cls(
            training_bytes(parameters, frozen * teacher, 0, 0),
            frozen * (parameters + teacher),
            training_bytes(0, 0, options.micro_batch * options.data.seqlen, text.vocab_size),
            frozen * gathered_numbers(block, outside),
        )

    def held(self, full: bool) -> int:
        """Bytes of the weights and of what belongs to them."""
        return self.all_weights if full else self.adapters

    def on_device(self, full: bool, place: WeightsPlace, processes: int) -> int:
        """Bytes on the device of each of so many processes."""
        if place == "host":
            return self.passing + self.gathered
        sharing = processes if place == "shared" else 1
        return shared_training_bytes(self.held(full), self.passing, self.gathered, sharing)

    def on_host(self, full: bool, place: WeightsPlace, processes: int) -> int:
        """Bytes of each of so many processes in the memory of its machine, where its device has a memory of its own."""
        return self.held(full) // processes if place == "host" else 0


@dataclass(frozen=True)
class _Room:
    """Bytes that are free for this process on its device and on its machine's host."""

    device: int
    host: int

    @classmethod
    def of(cls, ranks: Ranks) -> "_Room":
        """Ask. The processes of a machine share the host's memory."""
        host = free_bytes(HOST) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(free_bytes(ranks.device) if ranks.device.type == "cuda" else host, host)


def with_weights_chosen(options: FinetuneOptions, needs: Needs, ranks: Ranks) -> FinetuneOptions:
    """Return the options with `full` and `place` decided, by the memory of the first rank's device and machine.

    All weights are trained if the devices hold them, whole or shared, or else adapters. Weights are shared, or lie on
    the host, only where they have to, because that takes time.

    Args:
        options: The options of the command.
        needs: The bytes that the training needs.
        ranks: The processes.

    Raises:
        OptionsError: none of it fits, or there is nobody to share with.
    """
    if options.place == "shared" and ranks.size == 1:
        raise OptionsError(
            "--place shared in one process",
            allowed="several processes that share the weights, or --place host",
            next_step="torchrun --nproc-per-node 8 -m eigenslice finetune ..., with the number of your GPUs",
        )
    full, place = ranks.on_first(lambda: _choose(options, needs, ranks))
    return type(options)(**options.model_dump() | {"full": full, "place": place})


def _choose(options: FinetuneOptions, needs: Needs, ranks: Ranks) -> Way:
    """The first way that fits, in the order of what recovers most and takes least time."""
    adapters_alone = options.full is False or options.keep_adapter
    kinds = [False] if adapters_alone else [True] if options.full else [True, False]
    sharing: list[WeightsPlace] = ["shared"] if ranks.size > 1 else []
    places: list[WeightsPlace] = ["device", *sharing] if options.place is None else [options.place]
    ways: list[Way] = [(full, place) for full in kinds for place in places]
    if options.place is None and ranks.device.type == "cuda":  # the host is the device of a CPU
        ways.append((kinds[-1], "host"))
    room = _Room.of(ranks)
    shares = {way: _share_of_memory(needs, way, ranks, room) for way in ways}
    least = min(ways, key=lambda way: shares[way])
    if shares[least] > 1:
        raise _too_large(options, needs, least, ranks, room)
    return next((way for way in ways if shares[way] <= FREE), least)


def _share_of_memory(needs: Needs, way: Way, ranks: Ranks, room: _Room) -> float:
    """The share of the free memory that a way takes, on the device or on the host, whichever is more."""
    device, host = needs.on_device(*way, ranks.size), needs.on_host(*way, ranks.size)
    if ranks.device.type != "cuda":
        return (device + host) / max(1, room.host)
    return max(device / max(1, room.device), host / max(1, room.host))


def _too_large(options: FinetuneOptions, needs: Needs, way: Way, ranks: Ranks, room: _Room) -> OptionsError:
    full, place = way
    what = "all weights" if full else "adapters"
    device, host = needs.on_device(full, place, ranks.size), needs.on_host(full, place, ranks.size)
    taken = f"{device / GIB:.1f} GiB in each process, and {room.device / GIB:.1f} are free"
    if host:
        taken += f", and {host / GIB:.1f} GiB on the host, where {room.host / GIB:.1f} are free"
    counts = (2**power for power in range(1, int(math.log2(MOST)) + 1))
    enough = next((n for n in counts if needs.on_device(full, "shared", n) <= FREE * room.device), None)
    steps = [] if enough is None else [f"torchrun --nproc-per-node {enough} -m eigenslice finetune ... shares them"]
    steps += ["leave --full out"] if full and options.full else []
    steps += ["lower --seqlen or --micro-batch"] if needs.passing > room.device // 4 else []
    return OptionsError(
        f"training {what} of {options.model} takes {taken}",
        allowed="a model that fits: on the device, shared among the processes' devices, or on the host",
        next_step="; ".join(steps) or "train on a device with more memory",
    )


def advice(options: FinetuneOptions) -> str:
    """Return what to change where memory has run out."""
    ways = {
        f"--micro-batch 1 instead of {options.micro_batch}": options.micro_batch > 1,
        "--checkpoint-activations": not options.checkpoint_activations,
        "--no-full, which trains LoRA": options.full is not False,
        "--place shared under torchrun": options.place == "device",
        "--place host": options.place != "host",
        "a shorter --seqlen": True,
    }
    return "less memory is taken by " + ", ".join(way for way, is_left in ways.items() if is_left)
