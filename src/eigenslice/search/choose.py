"""The search for the plan that loses least: neurons of each block, blocks to leave out, and trials."""

from dataclasses import replace
from typing import Any

from eigenslice.data.batches import Batch
from eigenslice.data.holdout import trial_batches
from eigenslice.measure.importance import Measurement
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.candidates import without_blocks
from eigenslice.plan.plan import Plan
from eigenslice.search.allocation import block_losses
from eigenslice.search.depth import missed_least
from eigenslice.search.trials import plans_at_once, try_plans
from eigenslice.stream.run import Run

WIDTHS = 2
"""Plans of the best kind that are tried next, and again while the last one is the best; they cut more of the width."""
CANDIDATES = 4
"""Blocks that are measured beside twice as many as may be left out."""


def choose_plan(
    run: Run, families: list[list[Plan]], measurement: Measurement, options: SliceOptions
) -> tuple[Plan, list[dict[str, Any]]]:
    """Find the plan that loses least on held-out tokens, and the loss of each plan that was tried.

    The first plan of each family is tried, and the best family is taken. This decides the numbers of heads and blocks.
    Then the other plans of this family are tried, for as long as they gain.

    Args:
        run: The run.
        families: The plans that may be tried, see `make_plans`.
        measurement: Statistics of the dense model.
        options: The options of the command. They decide whether layers will be fitted. In plans for a size, blocks may
            differ in their neurons, if the class allows it, and the blocks to leave out are open.
    """
    batches = trial_batches(run.tokens.batches)
    if options.keep is not None and options.trials:
        families = _leave_out(run, families, batches, options)
        families = _allocate(run, families, measurement, batches, options.multiple)
    candidates = [plan for family in families for plan in family]
    if len(candidates) == 1:
        return candidates[0], []
    trials: list[tuple[Plan, float]] = []
    together = plans_at_once(run, candidates)

    def attempt(plans: list[Plan]) -> float:
        """Try plans, and return the loss of the last one."""
        for start in range(0, len(plans), together):
            some = plans[start : start + together]
            losses = try_plans(run, some, measurement, batches, number=len(trials), fits=options.fits)
            trials.extend(zip(some, losses, strict=True))
        return trials[-1][1]

    first = [family[0] for family in families]
    if len(first) > 1:
        attempt(first)
    best = min(range(len(trials)), key=lambda n: trials[n][1]) if trials else 0
    others = families[best][1:] if trials else families[best]
    while others:
        count = sum(plan.site_widths == others[0].site_widths for plan in others)  # neurons shared out in two ways
        tried, others = others[: count - 1 + WIDTHS], others[count - 1 + WIDTHS :]
        last = attempt(tried)
        if min(loss for _, loss in trials) < last:
            break  # plans that cut more of the width lose more
    chosen, _ = min(trials, key=lambda trial: trial[1])
    return chosen, [plan.describe() | {"kl": loss} for plan, loss in trials]


def _leave_out(run: Run, families: list[list[Plan]], batches: list[Batch], options: SliceOptions) -> list[list[Plan]]:
    """Return the plans, each without the least missed blocks, as many as it leaves out.

    If no plan for the size is without the least missed blocks, all plans stay as they are.
    """
    most = max(len(plan.dropped_blocks) for family in families for plan in family)
    if not most:
        return families
    order = list(missed_least(run, 2 * most + CANDIDATES, batches))
    anatomy = run.dense.anatomy
    without = [
        without_blocks(anatomy, options, family, order) if family[0].dropped_blocks else family for family in families
    ]
    return [family for family in without if family] or families


def _allocate(
    run: Run, families: list[list[Plan]], measurement: Measurement, batches: list[Batch], step: int
) -> list[list[Plan]]:
    """Return the plans. In the custom class, each block gets its own number of neurons, so that all blocks together
    lose least.

    The first plan of each family is there with equal numbers, too. Experts have the same number in all blocks.
    """
    anatomy = run.dense.anatomy

    def uneven(plan: Plan) -> bool:
        return plan.stock is None and plan.neurons_per_block[0] < anatomy.neuron_count and not anatomy.expert_count

    fewer = [plan.neurons_per_block[0] for family in families for plan in family if uneven(plan)]
    if not fewer:
        return families
    losses = block_losses(run, measurement, min(fewer), batches)
    result = []
    for family in families:
        first = [plan for plan in family[:1] if uneven(plan)]
        plans = [
            replace(plan, neurons_per_block=losses.allocate(plan.neurons_per_block[0], step, plan.kept_blocks))
            if uneven(plan)
            else plan
            for plan in family
        ]
        result.append([*plans[:1], *first, *plans[1:]])
    return result
