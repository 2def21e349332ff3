"""Checks of the sizes that a user asked for, against the model."""

from typing import Any

from eigenslice.arch import TABLES
from eigenslice.errors import OptionsError
from eigenslice.model.anatomy import Anatomy
from eigenslice.plan.dropped_blocks import why_blocks_stay
from eigenslice.plan.plan import BasisKind, Plan

ROUND = 8
"""Divisor of widths from --slicing and --keep; matrix kernels like such widths."""


def check_portable(anatomy: Anatomy, plan: Plan) -> None:
    """Refuse a plan for --portable that other runtimes don't run."""
    if plan.stock and plan.stock.portable:
        return
    saved = f"saved as {plan.stock.model_type}" if plan.stock else "saved in eigenslice's class"
    raise OptionsError(
        f"--portable: at width {plan.site_widths[0]} this {anatomy.table.model_type} model would be {saved}",
        allowed="types that llama.cpp and vLLM are known to run at sliced widths, "
        + ", ".join(sorted(t.model_type for t in TABLES.values() if any(f.portable for f in t.stock))),
        next_step=f"drop --portable, or choose a width that divides by the {anatomy.config.num_attention_heads} heads",
    )


def rounded(width: float, step: int = ROUND) -> int:
    """Down to a multiple, of 8 as in the official code; to less than 8 nothing is rounded."""
    whole = int(width + 1e-9)
    return whole if whole < step == ROUND else whole // step * step


def least_width(anatomy: Anatomy) -> int:
    """Return the least width of a result: behind LayerNorms, one dimension is lost."""
    return 2 if anatomy.layer_norm else 1


def check_width(anatomy: Anatomy, width: int, given: str) -> None:
    """Refuse a width that the model doesn't have; `given` says where the width is from."""
    least = least_width(anatomy)
    if not least <= width <= anatomy.width:
        raise OptionsError(
            f"{given}; the model's hidden width is {anatomy.width}",
            allowed=f"a width from {least} to {anatomy.width}",
            next_step=f"for example --width {rounded(0.75 * anatomy.width)}",
        )


def check_neurons(anatomy: Anatomy, basis: BasisKind, neurons: int, given: str) -> None:
    """Refuse a number of neurons that the model doesn't have; `given` says where the number is from."""
    if neurons != anatomy.neuron_count and basis == "per-block":
        raise OptionsError(
            f"{given} with --basis per-block",
            allowed="all neurons: per-block is the paper's algorithm, which cuts the hidden width only",
            next_step="drop one of them",
        )
    if neurons != anatomy.neuron_count and not 1 <= neurons <= anatomy.neuron_count:
        raise OptionsError(
            f"{given}; the model has {anatomy.neuron_count} MLP neurons in each "
            + ("expert" if anatomy.expert_count else "block"),
            allowed=f"1 to {anatomy.neuron_count}"
            if anatomy.neuron_count
            else "none: this architecture's can't be cut",
            next_step="leave it out to keep all of them",
        )


def _numbers_of_heads(anatomy: Anatomy, basis: BasisKind) -> str:
    """Return the numbers of key/value heads that a result can have, in words."""
    if anatomy.kv_head_count and basis == "global":
        return f"1 to {anatomy.kv_head_count}"
    why = anatomy.table.attention.why_no_heads
    return f"all of them: {why}" if why else "all of them"


def check_heads(anatomy: Anatomy, basis: BasisKind, heads: int, queries: int | None = None) -> None:
    """Refuse numbers of key/value heads and of query heads in a recipe that the model doesn't have.

    Args:
        anatomy: The dense model.
        basis: Global or per-block.
        heads: Number of key/value heads.
        queries: Number of query heads; None is as many for each key/value head as before.
    """
    step = anatomy.table.heads_step
    if heads % step:
        raise OptionsError(
            f"the recipe keeps {heads} key/value heads in each block",
            allowed=f"multiples of {step} up to {anatomy.kv_head_count}: {anatomy.table.model_type} holds them so",
            next_step="correct key_value_heads",
        )
    if heads != anatomy.kv_head_count and not (basis == "global" and 1 <= heads <= anatomy.kv_head_count):
        raise OptionsError(
            f"the recipe keeps {heads} key/value heads in each block; the model has {anatomy.kv_head_count} "
            "that can be cut",
            allowed=_numbers_of_heads(anatomy, basis),
            next_step="leave key_value_heads out to keep all of them",
        )
    dense = anatomy.head_counts
    most = heads * dense.group if dense else 0
    if queries is not None and not (basis == "global" and 1 <= queries <= most and queries % heads == 0):
        raise OptionsError(
            f"the recipe keeps {queries} query heads in each block, with {heads} key/value heads",
            allowed=f"multiples of {heads} up to {most}" if most and basis == "global" else "all of them",
            next_step="leave query_heads out to keep all query heads of the kept key/value heads",
        )


def check_experts(anatomy: Anatomy, basis: BasisKind, experts: int | None, given: str) -> None:
    """Refuse a number of experts that the model can't keep; `given` says where the number is from."""
    if experts is None or experts == anatomy.expert_count:
        return
    most, least, groups = (
        anatomy.expert_count,
        anatomy.fewest_experts if anatomy.expert_count else 0,
        anatomy.expert_groups,
    )
    if basis == "global" and anatomy.table.experts_field and least <= experts <= most and experts % groups == 0:
        return
    if not anatomy.table.experts_field:
        allowed = "none: this architecture has no experts"
    elif basis == "per-block":
        allowed = "all experts: per-block is the paper's algorithm, which cuts the hidden width only"
    elif groups > 1:
        allowed = f"multiples of {groups}, the number of their groups, from {least} to {most}"
    else:
        allowed = f"{least}, as many as a token needs, to {most}"
    raise OptionsError(
        f"{given}; the model has {most} experts in each mixture",
        allowed=allowed,
        next_step="leave it out to keep all of them",
    )


def check_dropped(anatomy: Anatomy, basis: BasisKind, dropped: list[Any]) -> None:
    """Refuse blocks in a recipe that the model can't be without."""
    if not dropped:
        return
    numbers = all(type(block) is int and 0 < block < anatomy.block_count for block in dropped)
    allowed = f"numbers from 1 to {anatomy.block_count - 1}, each once"
    if basis != "global":
        why, allowed = "", "none: blocks are left out with --basis global"
    elif not anatomy.can_drop_blocks:
        why, allowed = "", f"none: {why_blocks_stay(anatomy, dropped)}"
    elif not numbers or len({*dropped}) < len(dropped):
        why = ""
    else:
        why = why_blocks_stay(anatomy, dropped)
        allowed += ", of blocks whose removal the config can express"
    if why is not None:
        raise OptionsError(
            f"the recipe leaves out the blocks {dropped}; the model has {anatomy.block_count}" + (why and f": {why}"),
            allowed=allowed,
            next_step="leave dropped_blocks out" if allowed.startswith("none") else "correct dropped_blocks",
        )
