"""The values that will be stored of a model whose weights are shared among the processes."""

from typing import Any

from eigenslice.finetune.inputs import Sliced
from eigenslice.finetune.result import Save, merged
from eigenslice.finetune.sharding import gather, scatter
from eigenslice.runtime.ranks import Ranks


def merged_parts(model: Any, skeleton: Any, base: Sliced, ranks: Ranks) -> tuple[Any, Save | None]:
    """Give a shared model the values that will be stored; the first process has them as a whole, too, on the CPU.

    So one process takes as much of its machine's memory as it took to read the model in float32.

    Args:
        model: The trained model, shared, maybe with adapters.
        skeleton: The first process's copy of the model without weights; None in others.
        base: The sliced model, as it was before the training.
        ranks: The processes.

    Returns:
        The answer of `merged` in the first process; None and None in others.

    Raises:
        OutputError: NaN or infinite numbers.
        IncompleteError: numbers that only the stored dtype can't hold.
    """
    whole = list[tuple[Any, Save]]()
    gather(model, skeleton)
    ranks.on_first(lambda: whole.append(merged(skeleton, base)))
    tuned, save = whole[0] if whole else (None, None)
    scatter(model, tuned, ranks)
    return tuned, save
