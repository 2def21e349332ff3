"""From what the user asked for to plans that may be tried."""

from typing import Any

import yaml

from eigenslice.dense import DenseModel
from eigenslice.errors import OptionsError
from eigenslice.forms import choose_form
from eigenslice.options import SliceOptions
from eigenslice.plan import BasisKind, Plan, stored_parameters

ROUND = 8
"""Widths from --slicing and --keep are multiples of this: what matrix kernels like."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of the cut the hidden width may bear; MLP neurons bear the rest. The first ones are tried first."""
FEWEST_NEURONS = 0.25
"""Share of the neurons under which no plan goes while it could cut the width instead."""


def make_plans(dense: DenseModel, options: SliceOptions) -> list[Plan]:
    """The plans that are what the user asked for; with --keep several, to be tried.

    Raises:
        OptionsError: a width that the model doesn't have, a size that no width reaches, or a recipe that isn't one.
    """
    tied = dense.tied and options.basis == "global" and not options.untie
    if options.keep is not None:
        return _plans_for_size(dense, options, tied)
    if options.recipe is not None:
        return [_plan_of_recipe(dense, options)]
    if options.width is not None:
        width, found = options.width, f"--width {options.width}"
    else:
        assert options.slicing is not None  # SliceOptions checks that a size is given
        width = rounded((1 - options.slicing) * dense.width)
        found = f"--slicing {options.slicing} leaves width {width}"
    _check_width(dense, width, found)
    neurons = dense.neurons if options.neurons is None else options.neurons
    _check_neurons(dense, options.basis, neurons, f"--neurons {neurons}")
    return [choose_form(dense, options.basis, width, tied, options.form, neurons)]


def rounded(width: float) -> int:
    """Down to a multiple of 8, as the official code does; very narrow models are not rounded."""
    whole = int(width + 1e-9)
    return whole if whole < ROUND else whole // ROUND * ROUND


def _check_width(dense: DenseModel, width: int, found: str) -> None:
    least = 2 if dense.layer_norm else 1
    if not least <= width <= dense.width:
        raise OptionsError(
            f"{found}; the model's hidden width is {dense.width}",
            allowed=f"a width from {least} to {dense.width}",
            next_step=f"for example --width {rounded(0.75 * dense.width)}",
        )


def _check_neurons(dense: DenseModel, basis: BasisKind, neurons: int, found: str) -> None:
    if neurons != dense.neurons and basis == "per-block":
        raise OptionsError(
            f"{found} with --basis per-block",
            allowed="all neurons: per-block is the paper's algorithm, which cuts the hidden width only",
            next_step="drop one of them",
        )
    if neurons != dense.neurons and not 1 <= neurons <= dense.neurons:
        raise OptionsError(
            f"{found}; the model has {dense.neurons} MLP neurons in each block",
            allowed=f"1 to {dense.neurons}" if dense.neurons else "none: this architecture's can't be cut",
            next_step="leave it out to keep all of them",
        )


def _plan_of_recipe(dense: DenseModel, options: SliceOptions) -> Plan:
    """A plan from a file: an eigenslice.json, or YAML with the same fields as its `plan`."""
    fields: dict[str, Any] = {"width": int, "neurons": (int, list), "tied": bool, "basis": str}
    allowed = "an eigenslice.json, or YAML (or JSON) with width, and optionally neurons (one number or one for "
    allowed += "each block), tied and basis"
    try:
        assert options.recipe is not None
        content = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        recipe = content.get("plan", content)
        wrong = [
            str(k)
            for k, v in recipe.items()
            if k not in fields or not isinstance(v, fields[k]) or (isinstance(v, bool) and fields[k] is not bool)
        ]
        wrong += [] if "width" in recipe else ["width (missing)"]
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise OptionsError(
            f"--recipe {options.recipe} can't be read ({type(error).__name__}: {first})",
            allowed=allowed,
            next_step="check the file",
        ) from error
    counts = recipe.get("neurons", dense.neurons)
    counts = tuple(counts) if isinstance(counts, list) else (counts,) * dense.blocks
    if len(counts) != dense.blocks or not all(type(count) is int for count in counts):
        wrong.append(f"neurons (the model has {dense.blocks} blocks)")
    basis = recipe.get("basis", options.basis)
    if basis != options.basis:
        wrong.append(f"basis {basis} (the run has --basis {options.basis})")
    if wrong:
        raise OptionsError(
            f"--recipe {options.recipe} has a wrong {', '.join(wrong)}", allowed=allowed, next_step="correct the file"
        )
    _check_width(dense, recipe["width"], f"the recipe's width is {recipe['width']}")
    for count in counts:
        _check_neurons(dense, options.basis, count, f"the recipe keeps {count} neurons")
    tied = dense.tied and basis == "global" and not options.untie and recipe.get("tied", True)
    return choose_form(dense, basis, recipe["width"], tied, options.form, counts)


def _plans_for_size(dense: DenseModel, options: SliceOptions, tied: bool) -> list[Plan]:
    """Plans that store at most `keep` of the dense model's parameters, from cutting neurons only to width only."""
    assert options.keep is not None
    budget = int(options.keep * dense.parameters)
    narrow = _widest(dense, options, tied, budget)
    plans: list[Plan] = []
    if options.mlp and options.basis == "global" and dense.neurons:
        least = narrow.site_widths[0] if narrow else ROUND
        for share in SHARES:
            width = dense.width - share * (dense.width - least)
            width = dense.width if share == 0 else min(dense.width, rounded(width + ROUND / 2))
            plan = _most_neurons(dense, options, tied, budget, width)
            if plan is not None and plan not in plans:
                plans.append(plan)
    if narrow and narrow not in plans:
        plans.append(narrow)
    if not plans:
        smallest = stored_parameters(dense, choose_form(dense, options.basis, 1, tied, options.form))
        raise OptionsError(
            f"--keep {options.keep} is {budget} parameters; the narrowest model tried stores {smallest}",
            allowed="a size that some width reaches",
            next_step="raise --keep" + ("" if tied or not dense.tied else " or drop --untie"),
        )
    full = next((plan for plan in plans if not plan.cuts(dense)), None)
    return [full] if full else plans


def _widest(dense: DenseModel, options: SliceOptions, tied: bool, budget: int) -> Plan | None:
    """The widest plan with all neurons that stores at most `budget` parameters."""
    step = ROUND if dense.width >= 2 * ROUND else 1
    candidates = [dense.width, *range((dense.width - 1) // step * step, 0, -step)]
    low, high = 0, len(candidates) - 1
    best = None
    while low <= high:  # stored parameters grow with the width, so that halving finds the widest that fits
        middle = (low + high) // 2
        plan = choose_form(dense, options.basis, candidates[middle], tied, options.form)
        if stored_parameters(dense, plan) <= budget:
            best, high = plan, middle - 1
        else:
            low = middle + 1
    return best


def _most_neurons(dense: DenseModel, options: SliceOptions, tied: bool, budget: int, width: int) -> Plan | None:
    """The plan of a width with the most neurons, in multiples of 8, that stores at most `budget` parameters."""
    sizes = [
        stored_parameters(dense, choose_form(dense, options.basis, width, tied, options.form, count))
        for count in (dense.neurons, ROUND)
    ]
    if sizes[0] <= budget:
        return choose_form(dense, options.basis, width, tied, options.form)
    each = (sizes[0] - sizes[1]) / (dense.neurons - ROUND) if dense.neurons > ROUND else 0
    count = rounded((budget - sizes[1]) / each + ROUND) if each else 0
    if count < max(ROUND, FEWEST_NEURONS * dense.neurons):
        return None
    return choose_form(dense, options.basis, width, tied, options.form, count)
