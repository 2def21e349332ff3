"""From what the user asked for to plans that may be tried."""

import itertools
import math
from typing import Any

from eigenslice.arch import TABLES
from eigenslice.errors import OptionsError
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.forms import choose_form
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import FEWEST_NEURONS, BasisKind, Plan
from eigenslice.plan.recipe import read_recipe, wrong_recipe

ROUND = 8
"""Widths from --slicing and --keep are multiples of this: what matrix kernels like."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of the cut the hidden width may bear; MLP neurons bear the rest. The first ones are tried first."""
HEADS = (1.0, 0.75, 0.5)
"""Shares of the key/value heads that plans may keep."""
DROPS = (1 / 6, 1 / 3)
"""How much of the cut blocks that are left out may bear."""


def make_plans(dense: DenseModel, options: SliceOptions) -> list[list[Plan]]:
    """The plans that are what the user asked for; with --keep several, to be tried.

    Returns:
        For each number of heads, and of blocks left out, those first that cut neurons rather than the width. Which
        blocks are left out is known when they have been measured: here, they are the last ones.

    Raises:
        OptionsError: a width that the model doesn't have, a size that no width reaches, or a recipe that isn't one.
    """
    tied = dense.can_stay_tied and options.basis == "global" and not options.untie
    families = _make_plans(dense, options, tied)
    for plan in itertools.chain(*families) if options.portable else ():
        _check_portable(dense, plan)
    return families


def _step(dense: DenseModel, options: SliceOptions, heads: int | None = None) -> int:
    """What chosen widths are multiples of: with portable, of the number of query heads, too."""
    if not options.portable:
        return options.multiple
    queries = dense.config.num_attention_heads
    return math.lcm(options.multiple, queries if heads is None else queries // dense.kv_head_count * heads)


def _check_portable(dense: DenseModel, plan: Plan) -> None:
    if plan.stock and plan.stock.portable:
        return
    saved = f"saved as {plan.stock.model_type}" if plan.stock else "saved in eigenslice's class"
    raise OptionsError(
        f"--portable: at width {plan.site_widths[0]} this {dense.table.model_type} model would be {saved}",
        allowed="types that llama.cpp and vLLM are known to run at sliced widths, "
        + ", ".join(sorted(t.model_type for t in TABLES.values() if any(f.portable for f in t.stock))),
        next_step=f"drop --portable, or choose a width that divides by the {dense.config.num_attention_heads} heads",
    )


def _make_plans(dense: DenseModel, options: SliceOptions, tied: bool) -> list[list[Plan]]:
    if options.keep is not None:
        return _plans_for_size(dense, options, tied)
    if options.recipe is not None:
        return [[_plan_of_recipe(dense, options, tied)]]
    if options.width is not None:
        width, given = options.width, f"--width {options.width}"
    else:
        assert options.slicing is not None  # SliceOptions checks that a size is given
        width = rounded((1 - options.slicing) * dense.width, _step(dense, options))
        given = f"--slicing {options.slicing} leaves width {width}"
    _check_width(dense, width, given)
    neurons = dense.neuron_count if options.neurons is None else options.neurons
    _check_neurons(dense, options.basis, neurons, f"--neurons {neurons}")
    return [[choose_form(dense, options.basis, width, tied, options.form, neurons)]]


def rounded(width: float, step: int = ROUND) -> int:
    """Down to a multiple, of 8 as in the official code; to less than 8 nothing is rounded."""
    whole = int(width + 1e-9)
    return whole if whole < step == ROUND else whole // step * step


def _least_width(dense: DenseModel) -> int:
    return 2 if dense.layer_norm else 1


def _check_width(dense: DenseModel, width: int, given: str) -> None:
    least = _least_width(dense)
    if not least <= width <= dense.width:
        raise OptionsError(
            f"{given}; the model's hidden width is {dense.width}",
            allowed=f"a width from {least} to {dense.width}",
            next_step=f"for example --width {rounded(0.75 * dense.width)}",
        )


def _check_neurons(dense: DenseModel, basis: BasisKind, neurons: int, given: str) -> None:
    if neurons != dense.neuron_count and basis == "per-block":
        raise OptionsError(
            f"{given} with --basis per-block",
            allowed="all neurons: per-block is the paper's algorithm, which cuts the hidden width only",
            next_step="drop one of them",
        )
    if neurons != dense.neuron_count and not 1 <= neurons <= dense.neuron_count:
        raise OptionsError(
            f"{given}; the model has {dense.neuron_count} MLP neurons in each "
            + ("expert" if dense.expert_count else "block"),
            allowed=f"1 to {dense.neuron_count}" if dense.neuron_count else "none: this architecture's can't be cut",
            next_step="leave it out to keep all of them",
        )


def _check_heads(dense: DenseModel, basis: BasisKind, heads: int) -> None:
    if heads != dense.kv_head_count and not (basis == "global" and 1 <= heads <= dense.kv_head_count):
        raise OptionsError(
            f"the recipe keeps {heads} key/value heads in each block; the model has {dense.kv_head_count} that can be "
            "cut",
            allowed=f"1 to {dense.kv_head_count}" if dense.kv_head_count and basis == "global" else "all of them",
            next_step="leave key_value_heads out to keep all of them",
        )


def _check_dropped(dense: DenseModel, basis: BasisKind, dropped: list[Any]) -> None:
    numbers = all(type(block) is int and 0 < block < dense.block_count for block in dropped)
    if dropped and not (numbers and len({*dropped}) == len(dropped) and basis == "global" and dense.blocks_alike):
        can = basis == "global" and dense.blocks_alike
        raise OptionsError(
            f"the recipe leaves out the blocks {dropped}; the model has {dense.block_count}",
            allowed=f"numbers from 1 to {dense.block_count - 1}, each once"
            if can
            else "none: blocks are left out with --basis global, of models whose blocks are all alike",
            next_step="correct dropped_blocks" if can else "leave dropped_blocks out",
        )


def _plan_of_recipe(dense: DenseModel, options: SliceOptions, tied: bool) -> Plan:
    """A plan from a file: an eigenslice.json, or YAML with the same fields as its `plan`, which may untie."""
    assert options.recipe is not None
    recipe = read_recipe(options.recipe)
    dropped = recipe.get("dropped_blocks", [])
    _check_dropped(dense, options.basis, dropped)
    blocks = dense.block_count - len(dropped)
    counts = recipe.get("neurons", dense.neuron_count)
    counts = tuple(counts) if isinstance(counts, list) else (counts,) * blocks
    basis = recipe.get("basis", options.basis)
    wrong = [f"neurons (the result has {blocks} blocks)"] if len(counts) != blocks else []
    wrong += [f"basis {basis} (the run has --basis {options.basis})"] if basis != options.basis else []
    if wrong:
        raise wrong_recipe(options.recipe, wrong)
    _check_width(dense, recipe["width"], f"the recipe's width is {recipe['width']}")
    for count in counts:
        _check_neurons(dense, options.basis, count, f"the recipe keeps {count} neurons")
    if recipe.get("tied") and not tied:
        raise OptionsError(
            "the recipe keeps embedding and head tied",
            allowed="tied: false here: the model's are not, or can't stay so with --basis per-block or --untie",
            next_step="leave tied out of the recipe",
        )
    heads = recipe.get("key_value_heads", dense.kv_head_count)
    _check_heads(dense, options.basis, heads)
    tied = tied and recipe.get("tied", True)
    return choose_form(dense, basis, recipe["width"], tied, options.form, counts, heads, tuple(sorted(dropped)))


def _plans_for_size(dense: DenseModel, options: SliceOptions, tied: bool) -> list[list[Plan]]:
    """Plans that store at most `keep` of the dense model's parameters."""
    assert options.keep is not None
    budget = int(options.keep * dense.parameters)
    more = options.mlp and options.fits and options.basis == "global"
    cuts_heads, drops = more and options.heads and dense.kv_head_count, more and options.depth and dense.blocks_alike
    numbers = [math.ceil(share * dense.kv_head_count) for share in HEADS] if cuts_heads else [None]
    kinds = [(heads, 0) for heads in numbers]
    if drops:
        cut = (dense.parameters - budget) / dense.block_parameters
        kinds += [(numbers[0], round(share * cut)) for share in DROPS]
    families = [_family(dense, options, tied, budget, *kind) for kind in dict.fromkeys(kinds)]
    families = [family for family in families if family]
    if not families:
        smallest = stored_parameters(dense, choose_form(dense, options.basis, 1, tied, options.form))
        raise OptionsError(
            f"--keep {options.keep} is {budget} parameters; the narrowest model tried stores {smallest}",
            allowed="a size that some width reaches",
            next_step="raise --keep" + ("" if tied or not dense.tied else " or drop --untie"),
        )
    full = next((plan for family in families for plan in family if not plan.cuts(dense)), None)
    return [[full]] if full else families


def _family(
    dense: DenseModel, options: SliceOptions, tied: bool, budget: int, heads: int | None, drop: int
) -> list[Plan]:
    """Plans with so many key/value heads and so many blocks less: first those that cut no width, last no neurons."""
    dropped = tuple(range(dense.block_count - drop, dense.block_count))
    narrow = _widest(dense, options, tied, budget, heads, dropped)
    plans: list[Plan] = []
    if options.mlp and options.basis == "global" and dense.neuron_count:
        step = _step(dense, options, heads)
        least = narrow.site_widths[0] if narrow else step
        for share in SHARES:
            width = dense.width - share * (dense.width - least)
            width = dense.width if share == 0 else min(dense.width, rounded(width + step / 2, step))
            if width < _least_width(dense):
                continue  # --multiple is wider than the model
            plan = _most_neurons(dense, options, tied, budget, width, heads, dropped)
            if plan is not None and plan not in plans:
                plans.append(plan)
    if narrow and narrow not in plans:
        plans.append(narrow)
    return plans


def _widest(
    dense: DenseModel, options: SliceOptions, tied: bool, budget: int, heads: int | None, dropped: tuple[int, ...]
) -> Plan | None:
    """The widest plan with all neurons that stores at most `budget` parameters."""
    step = _step(dense, options, heads)
    if step == ROUND and dense.width < 2 * ROUND:
        step = 1
    candidates = [dense.width, *range((dense.width - 1) // step * step, 0, -step)]
    low, high = 0, len(candidates) - 1
    best = None
    while low <= high:  # stored parameters grow with the width, so that halving finds the widest that fits
        middle = (low + high) // 2
        plan = choose_form(dense, options.basis, candidates[middle], tied, options.form, heads=heads, dropped=dropped)
        if stored_parameters(dense, plan) <= budget:
            best, high = plan, middle - 1
        else:
            low = middle + 1
    return best


def _most_neurons(
    dense: DenseModel,
    options: SliceOptions,
    tied: bool,
    budget: int,
    width: int,
    heads: int | None,
    dropped: tuple[int, ...],
) -> Plan | None:
    """The plan of a width with the most neurons, in multiples, that stores at most `budget` parameters."""

    def plan(count: int) -> Plan:
        return choose_form(dense, options.basis, width, tied, options.form, count, heads, dropped)

    step = options.multiple
    sizes = [stored_parameters(dense, plan(count)) for count in (dense.neuron_count, step)]
    if sizes[0] <= budget:
        return plan(dense.neuron_count)
    each = (sizes[0] - sizes[1]) / (dense.neuron_count - step) if dense.neuron_count > step else 0
    count = rounded((budget - sizes[1]) / each + step, step) if each else 0
    if count < max(step, FEWEST_NEURONS * dense.neuron_count):
        return None
    return plan(count)
