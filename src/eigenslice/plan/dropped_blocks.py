"""Which blocks of a model can be left out: those without which all others stay what they are."""

from collections.abc import Sequence

from eigenslice.checkpoint.empty import empty_model
from eigenslice.errors import CheckpointError, first_line
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.block_kinds import ENTRY_PER_BLOCK, block_kinds, entries_of
from eigenslice.plan.kept_blocks import NUMBERS_OF_BLOCKS, PATTERNS, dense_config, has_entry_per_block
from eigenslice.plan.result_config import checked_config

RECURRENT = "linear_attention"
"""Entry of `layer_types` for recurrent blocks."""


def why_blocks_stay(anatomy: Anatomy, dropped: Sequence[int]) -> str | None:
    """Return the reason why some blocks can't be left out together; None if they can.

    Args:
        anatomy: The dense model.
        dropped: Numbers of the blocks.
    """
    if not anatomy.can_drop_blocks:
        numbered = anatomy.table.numbered
        return f"blocks depend on their numbers ({numbered})" if anatomy.block_count > 1 else "there is one block"
    unknown = _unknown_lists(anatomy)
    if unknown:
        return f"the config has a list for the blocks that eigenslice doesn't know ({unknown[0]})"
    kept = tuple(block for block in range(anatomy.block_count) if block not in dropped)
    lost = _lost_kinds(anatomy, kept)
    if lost:
        return f"transformers' cache of a model with recurrent blocks needs one block of {lost[0]}, too"
    try:
        config = checked_config(dense_config(anatomy, kept))
        kinds = block_kinds(config, empty_model(config), anatomy.table.layers)
    except (ValueError, CheckpointError) as error:
        return first_line(error)
    changed = [block for block, kind in zip(kept, kinds, strict=True) if kind != anatomy.kinds[block]]
    return f"no {anatomy.table.model_type} config can hold block {changed[0]} behind the gap" if changed else None


def blocks_to_drop(anatomy: Anatomy, order: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the first blocks of an order that can be left out together, ascending; fewer if there aren't so many.

    Args:
        anatomy: The dense model.
        order: Numbers of blocks, the first one to go first.
        count: Number of blocks that are to go.
    """
    if not count or why_blocks_stay(anatomy, order[:count]) is None:
        return tuple(sorted(order[:count]))
    chosen: tuple[int, ...] = ()
    for block in order:
        if len(chosen) < count and why_blocks_stay(anatomy, (*chosen, block)) is None:
            chosen = (*chosen, block)
    return tuple(sorted(chosen))


def _unknown_lists(anatomy: Anatomy) -> list[str]:
    """Return fields that seem to have an entry for each block, which differ, and that eigenslice doesn't know."""
    known = (*ENTRY_PER_BLOCK, *NUMBERS_OF_BLOCKS, PATTERNS)
    values, blocks = anatomy.config.to_dict(), anatomy.block_count
    lists = {key: v for key, v in values.items() if key not in known and has_entry_per_block(key, v, blocks)}
    return [key for key, value in lists.items() if value.count(value[0]) < blocks]


def _lost_kinds(anatomy: Anatomy, kept: Sequence[int]) -> list[str]:
    """Return the layer types that a model with recurrent blocks has none of any more."""
    types = entries_of(anatomy.config, "layer_types")
    left = {types[block] for block in kept} if RECURRENT in types else set(types)
    return sorted(set(types) - left)
