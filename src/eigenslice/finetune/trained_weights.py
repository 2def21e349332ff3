"""The weights that are trained: all of them where the memory is enough, or else adapters."""

from typing import Any

from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.runtime.offload import free_bytes
from eigenslice.runtime.ranks import Ranks
from eigenslice.slicing.memory import training_bytes

FREE = 0.8
"""Share of the free memory that a training may take; the rest is for activations."""


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
    of_model, of_teacher = _bytes(model), 0 if teacher is None else _bytes(teacher)
    vocabulary = model.config.get_text_config().vocab_size
    parameters = sum(p.numel() for p in model.parameters())
    needed = training_bytes(parameters, of_teacher, options.micro_batch * options.data.seqlen, vocabulary)
    here = of_model + of_teacher if ranks.device.type == "cpu" else 0  # it is in memory already
    fits = ranks.on_first(lambda: not options.keep_adapter and needed <= FREE * (free_bytes(ranks.device) + here))
    return type(options)(**options.model_dump() | {"full": fits})


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
