"""From the user's options to plans that may be tried."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from eigenslice.errors import OptionsError
from eigenslice.model.anatomy import Anatomy
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.checks import (
    ROUND,
    check_dropped,
    check_experts,
    check_heads,
    check_neurons,
    check_portable,
    check_width,
    least_width,
    rounded,
)
from eigenslice.plan.dropped_blocks import blocks_to_drop
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import FEWEST_NEURONS, Plan, Sizes
from eigenslice.plan.recipe import read_recipe, wrong_recipe
from eigenslice.plan.request import Request, request_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the cut that the hidden width may bear, in the order of trials; MLP neurons bear the rest."""
HEADS = (1.0, 0.75, 0.5)
"""Shares of the key/value heads that plans may keep, or of each key/value head's query heads."""
FEW_HEADS = 2
"""Number of key/value heads up to which plans may keep fewer query heads for each of them."""
EXPERTS = (0.5, 1.0)
"""Shares of the cut that experts may bear beside 0; their neurons, or the width, bear the rest."""
DROPS = (1 / 6, 1 / 3)
"""Shares of the cut that blocks to leave out may bear."""


def make_plans(anatomy: Anatomy, options: SliceOptions) -> list[list[Plan]]:
    """Return the plans that fit the user's options; --keep gives several plans to try.

    Returns:
        A family for each number of heads and of blocks to leave out. In a family, plans that cut neurons come before
        plans that cut the width. Here the last blocks are left out; measuring decides later (`without_blocks`).

    Raises:
        OptionsError: the model doesn't have the width, no width reaches the size, or the recipe is wrong.
    """
    families = _make_plans(request_of(anatomy, options))
    for plan in itertools.chain(*families) if options.portable else ():
        check_portable(anatomy, plan)
    return families


def without_blocks(anatomy: Anatomy, options: SliceOptions, family: list[Plan], order: Sequence[int]) -> list[Plan]:
    """Return a family's plans without other blocks, as many as before.

    Blocks may be of different sizes. So the other sizes of the plans are chosen anew, and no plan is over the budget.

    Args:
        anatomy: The dense model.
        options: The options of the command, with --keep.
        family: The family, see `make_plans`.
        order: Numbers of the blocks that may go, the first one to go first.

    Returns:
        The plans. There are none where blocks are too small for the budget, or can't be left out together.
    """
    dropped = blocks_to_drop(anatomy, order, len(family[0].dropped_blocks))
    if not dropped:
        return []
    if anatomy.blocks_alike:
        return [replace(plan, dropped_blocks=dropped) for plan in family]
    first = family[0]
    return _family(request_of(anatomy, options), Sizes(anatomy.width, None, first.kv_heads, dropped, first.query_heads))


def _make_plans(request: Request) -> list[list[Plan]]:
    anatomy, options = request.anatomy, request.options
    if options.keep is not None:
        return _plans_for_size(request)
    if options.recipe is not None:
        return [[_plan_of_recipe(request)]]
    if options.slicing is None:  # --experts may be alone
        width = anatomy.width if options.width is None else options.width
        given = f"--width {options.width}"
    else:
        width = rounded((1 - options.slicing) * anatomy.width, request.step())
        given = f"--slicing {options.slicing} leaves width {width}"
    check_width(anatomy, width, given)
    neurons = anatomy.neuron_count if options.neurons is None else options.neurons
    check_neurons(anatomy, options.basis, neurons, f"--neurons {neurons}")
    check_experts(anatomy, options.basis, options.experts, f"--experts {options.experts}")
    return [[request.plan(Sizes(width, neurons, experts=options.experts))]]


def _plan_of_recipe(request: Request) -> Plan:
    """A plan from a file: an eigenslice.json, or YAML with the same fields as its `plan`, which may untie."""
    anatomy, options = request.anatomy, request.options
    assert options.recipe is not None
    recipe = read_recipe(options.recipe)
    dropped = recipe.get("dropped_blocks", [])
    check_dropped(anatomy, options.basis, dropped)
    blocks = anatomy.block_count - len(dropped)
    counts = recipe.get("neurons", anatomy.neuron_count)
    counts = tuple(counts) if isinstance(counts, list) else (counts,) * blocks
    basis = recipe.get("basis", options.basis)
    wrong = [f"neurons (the result has {blocks} blocks)"] if len(counts) != blocks else []
    wrong += [f"basis {basis} (the run has --basis {options.basis})"] if basis != options.basis else []
    if wrong:
        raise wrong_recipe(options.recipe, wrong)
    check_width(anatomy, recipe["width"], f"the recipe's width is {recipe['width']}")
    for count in counts:
        check_neurons(anatomy, options.basis, count, f"the recipe keeps {count} neurons")
    if recipe.get("tied") and not request.tied:
        raise OptionsError(
            "the recipe keeps embedding and head tied",
            allowed="tied: false here: the model's are not, or can't stay so with --basis per-block or --untie",
            next_step="leave tied out of the recipe",
        )
    heads = recipe.get("key_value_heads", anatomy.kv_head_count)
    queries = recipe.get("query_heads")
    check_heads(anatomy, options.basis, heads, queries)
    experts = recipe.get("experts")
    check_experts(anatomy, options.basis, experts, f"the recipe keeps {experts} experts")
    request = replace(request, tied=request.tied and recipe.get("tied", True))
    return request.plan(Sizes(recipe["width"], counts, heads, tuple(sorted(dropped)), queries, experts))


def _plans_for_size(request: Request) -> list[list[Plan]]:
    """Plans that store at most `keep` of the dense model's parameters."""
    anatomy, options = request.anatomy, request.options
    more = options.mlp and options.fits and options.basis == "global"
    more = more and options.trials
    heads = _numbers_of_heads(anatomy) if more and options.heads else [(None, None)]
    kinds = [(numbers, 0, None) for numbers in heads]
    if more and anatomy.expert_count and anatomy.table.experts_field:
        kinds += [(heads[0], 0, experts) for experts in _numbers_of_experts(request)]
    blocks = anatomy.block_count
    if more and options.depth and anatomy.can_drop_blocks:
        mean_size = statistics.mean(anatomy.block_sizes[1:])
        cut = max(0, anatomy.remaining_parameters - request.budget) / mean_size
        kinds += [(heads[0], min(blocks - 1, round(share * cut)), None) for share in DROPS]
    last = range(blocks - 1, 0, -1)
    sizes = [
        Sizes(anatomy.width, None, kv_heads, blocks_to_drop(anatomy, last, drop), query_heads, experts)
        for (kv_heads, query_heads), drop, experts in dict.fromkeys(kinds)
    ]
    families = [_family(request, whole) for whole in dict.fromkeys(sizes)]
    families = [family for family in families if family]
    if not families:
        smallest = stored_parameters(anatomy, request.plan(Sizes(1)))
        raise OptionsError(
            f"--keep {options.keep} is {request.budget} parameters; the narrowest model tried stores {smallest}",
            allowed="a size that some width reaches",
            next_step="raise --keep" + ("" if request.tied or not anatomy.tied else " or drop --untie"),
        )
    full = next((plan for family in families for plan in family if not plan.cuts(anatomy)), None)
    if full is None and not options.trials:
        full = families[0][0]
    return [[full]] if full else families


def _numbers_of_heads(anatomy: Anatomy) -> list[tuple[int | None, int | None]]:
    """Return the numbers of key/value heads and of query heads that plans may keep, the dense model's first.

    None is the dense model's number. Where there are few key/value heads, their query heads can be cut, too.
    """
    dense, step = anatomy.head_counts, anatomy.table.heads_step
    if dense is None:
        return [(None, None)]
    numbers: list[tuple[int | None, int | None]] = [(None, None)]
    counts = [math.ceil(share * dense.kv / step) * step for share in HEADS]
    numbers += [(count, None) for count in counts if count < dense.kv]
    if dense.kv <= FEW_HEADS and dense.group > 1:
        groups = [math.ceil(share * dense.group) for share in HEADS]
        numbers += [(dense.kv, dense.kv * group) for group in groups if group < dense.group]
    return numbers


def _numbers_of_experts(request: Request) -> list[int]:
    """Return the numbers of experts that plans may keep, without the dense model's."""
    anatomy = request.anatomy
    every, step = anatomy.expert_count, anatomy.expert_groups
    fewer = [
        stored_parameters(anatomy, request.plan(Sizes(anatomy.width, experts=count))) for count in (every, every - step)
    ]
    each = (fewer[0] - fewer[1]) / step
    cut = max(0, anatomy.remaining_parameters - request.budget)
    numbers = [every - math.ceil(share * cut / each / step - 1e-9) * step for share in EXPERTS]
    return [count for count in dict.fromkeys(numbers) if anatomy.fewest_experts <= count < every]


def _family(request: Request, whole: Sizes) -> list[Plan]:
    """Return plans with the same heads and blocks: the first plan cuts no width, the last one no neurons.

    Args:
        request: The user's options.
        whole: The sizes with the dense model's width and all neurons.
    """
    anatomy, options = request.anatomy, request.options
    narrow = _widest(request, whole)
    plans: list[Plan] = []
    if options.mlp and options.basis == "global" and anatomy.neuron_count:
        step = request.step(whole)
        least = narrow.site_widths[0] if narrow else step
        for share in SHARES:
            width = anatomy.width - share * (anatomy.width - least)
            width = anatomy.width if share == 0 else min(anatomy.width, rounded(width + step / 2, step))
            if width < least_width(anatomy):
                continue  # --multiple is wider than the model
            plan = _most_neurons(request, replace(whole, width=width))
            if plan is not None and plan not in plans:
                plans.append(plan)
    if narrow and narrow not in plans:
        plans.append(narrow)
    return plans


def _widest(request: Request, whole: Sizes) -> Plan | None:
    """Return the widest plan with all neurons that fits the budget, with heads and blocks of `whole`."""
    width, step = request.anatomy.width, request.step(whole)
    if step == ROUND and width < 2 * ROUND:
        step = 1
    candidates = [width, *range((width - 1) // step * step, 0, -step)]
    low, high = 0, len(candidates) - 1
    best = None
    while low <= high:  # stored parameters grow with the width, so that halving finds the widest that fits
        middle = (low + high) // 2
        plan = request.plan(replace(whole, width=candidates[middle]))
        if request.fits(plan):
            best, high = plan, middle - 1
        else:
            low = middle + 1
    return best


def _most_neurons(request: Request, sizes: Sizes) -> Plan | None:
    """Return the plan with the most neurons, in multiples, that fits the budget; other sizes are as in `sizes`."""
    every, step = request.anatomy.neuron_count, request.options.multiple

    def plan(count: int) -> Plan:
        return request.plan(replace(sizes, neurons=count))

    most, least = (stored_parameters(request.anatomy, plan(count)) for count in (every, step))
    if most <= request.budget:
        return plan(every)
    each = (most - least) / (every - step) if every > step else 0
    count = rounded((request.budget - least) / each + step, step) if each else 0
    if count < max(step, FEWEST_NEURONS * every):
        return None
    return plan(count)
