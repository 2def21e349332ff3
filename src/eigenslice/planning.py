"""From what the user asked for to a plan."""

from eigenslice.dense import DenseModel
from eigenslice.errors import OptionsError
from eigenslice.forms import choose_form
from eigenslice.options import SliceOptions
from eigenslice.plan import Plan, stored_parameters

ROUND = 8
"""Widths from --slicing and --keep are multiples of this: what matrix kernels like."""


def make_plan(dense: DenseModel, options: SliceOptions) -> Plan:
    """Choose the width and the form of the result.

    Raises:
        OptionsError: a width that the model doesn't have, or a size that no width reaches.
    """
    tied = dense.tied and options.basis == "global" and not options.untie
    if options.keep is not None:
        return _plan_for_size(dense, options, tied)
    if options.width is not None:
        width = options.width
        found, least = f"--width {width}", 2 if dense.layer_norm else 1
    else:
        assert options.slicing is not None  # SliceOptions checks that one of the three is given
        width = rounded((1 - options.slicing) * dense.width)
        found, least = f"--slicing {options.slicing} leaves width {width}", 2 if dense.layer_norm else 1
    if not least <= width <= dense.width:
        raise OptionsError(
            f"{found}; the model's hidden width is {dense.width}",
            allowed=f"a width from {least} to {dense.width}",
            next_step=f"for example --width {rounded(0.75 * dense.width)}",
        )
    return choose_form(dense, options.basis, width, tied, options.form)


def rounded(width: float) -> int:
    """Down to a multiple of 8, as the official code does; very narrow models are not rounded."""
    whole = int(width + 1e-9)
    return whole if whole < ROUND else whole // ROUND * ROUND


def _plan_for_size(dense: DenseModel, options: SliceOptions, tied: bool) -> Plan:
    """The widest plan that stores at most `keep` of the dense model's parameters."""
    assert options.keep is not None
    budget = options.keep * dense.parameters
    step = ROUND if dense.width >= 2 * ROUND else 1
    candidates = [dense.width, *range((dense.width - 1) // step * step, 0, -step)]
    smallest = None
    low, high = 0, len(candidates) - 1
    best = None
    while low <= high:  # stored parameters grow with the width, so that halving finds the widest that fits
        middle = (low + high) // 2
        plan = choose_form(dense, options.basis, candidates[middle], tied, options.form)
        smallest = stored_parameters(dense, plan)
        if smallest <= budget:
            best, high = plan, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise OptionsError(
            f"--keep {options.keep} is {int(budget)} parameters; the narrowest model tried stores {smallest}",
            allowed="a size that some width reaches",
            next_step="raise --keep" + ("" if tied or not dense.tied else " or drop --untie"),
        )
    return best
