"""What is trained, and where it lies: all weights or adapters, whole on each device or shared among the processes."""

import math
import os
from dataclasses import dataclass
from typing import Any

from eigenslice.checkpoint.writer import GIB
from eigenslice.errors import OptionsError
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.runtime.offload import free_bytes
from eigenslice.runtime.ranks import Ranks
from eigenslice.slicing.memory import gathered_numbers, shared_training_bytes, training_bytes

FREE = 0.8
"""Share of the free memory that a training may take; the rest is for activations."""
MOST = 4096
"""Most processes that are proposed."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a training needs.

    Attributes:
        all_weights: The weights, their gradients, the optimizer and the teacher.
        adapters: The same where adapters are trained, without the adapters themselves.
        passing: The logits of the windows that pass at once.
        gathered: The weights that are gathered at once where they are shared.
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

    def in_each(self, full: bool, processes: int) -> int:
        """Bytes in each of so many processes that share the weights."""
        held = self.all_weights if full else self.adapters
        return shared_training_bytes(held, self.passing, self.gathered, processes)


def with_weights_chosen(options: FinetuneOptions, needs: Needs, ranks: Ranks) -> FinetuneOptions:
    """Return the options with `full` and `shard` decided, by the memory of the first rank's device.

    All weights are trained if they fit, whole or shared, or else adapters. Weights are shared only where they have to
    be, because that takes time.

    Args:
        options: The options of the command.
        needs: The bytes that the training needs.
        ranks: The processes.

    Raises:
        OptionsError: none of it fits, or there is nobody to share with.
    """
    if options.shard and ranks.size == 1:
        raise OptionsError(
            "--shard in one process",
            allowed="several processes that share the weights",
            next_step="torchrun --nproc-per-node 8 -m eigenslice finetune ..., with the number of your GPUs",
        )
    full, shard = ranks.on_first(lambda: _choose(options, needs, ranks))
    return type(options)(**options.model_dump() | {"full": full, "shard": shard})


def _choose(options: FinetuneOptions, needs: Needs, ranks: Ranks) -> tuple[bool, bool]:
    """The first way that fits, in the order of what recovers most and takes least time."""
    adapters_alone = options.full is False or options.keep_adapter
    kinds = [False] if adapters_alone else [True] if options.full else [True, False]
    places = [False, True] if options.shard is None else [options.shard]
    ways = [(full, shard) for full in kinds for shard in places if ranks.size > 1 or not shard]
    sizes = {(full, shard): needs.in_each(full, ranks.size if shard else 1) for full, shard in ways}
    room = _room(ranks)
    for way, size in sizes.items():
        if size <= FREE * room:
            return way
    least = min(ways, key=lambda way: sizes[way])
    if sizes[least] > room:
        raise _too_large(options, needs, least, sizes[least], room)
    return least


def _room(ranks: Ranks) -> int:
    """Bytes that are free for this process: those on a CPU share the memory of their machine."""
    free = free_bytes(ranks.device)
    return free if ranks.device.type == "cuda" else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _too_large(options: FinetuneOptions, needs: Needs, way: tuple[bool, bool], size: int, room: int) -> OptionsError:
    what = "all weights" if way[0] else "adapters"
    counts = (2**power for power in range(1, int(math.log2(MOST)) + 1))
    enough = next((n for n in counts if needs.in_each(way[0], n) <= FREE * room), None)
    steps = [] if enough is None else [f"torchrun --nproc-per-node {enough} -m eigenslice finetune ... shares them"]
    steps += ["leave --full out"] if way[0] and options.full else []
    steps += ["lower --seqlen or --micro-batch"] if needs.passing > room // 4 else []
    return OptionsError(
        f"training {what} of {options.model} takes {size / GIB:.1f} GiB in each process, and {room / GIB:.1f} are free",
        allowed="a model that fits, whole or shared among the processes",
        next_step="; ".join(steps) or "train on a device with more memory",
    )


def advice(options: FinetuneOptions) -> str:
    """Return what to change where memory has run out."""
    ways = {
        f"--micro-batch 1 instead of {options.micro_batch}": options.micro_batch > 1,
        "--checkpoint-activations": not options.checkpoint_activations,
        "--no-full, which trains LoRA": options.full is not False,
        "--shard under torchrun": not options.shard,
        "a shorter --seqlen": True,
    }
    return "less memory is taken by " + ", ".join(way for way, is_left in ways.items() if is_left)
