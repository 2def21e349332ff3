"""Plans tried on held-out calibration tokens: each is fitted on a few sequences and measured on others."""

from collections import deque

import torch

from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.fit.beside import run_beside
from eigenslice.fit.ridges import Fitting
from eigenslice.fit.twin import SlicedTwin
from eigenslice.fit.working_memory import working_bytes
from eigenslice.measure.divergence import divergences, make_heads
from eigenslice.measure.importance import Measurement
from eigenslice.plan.plan import Plan, most_neurons
from eigenslice.runtime.offload import MOST, free_bytes
from eigenslice.stream.run import Run

PLANNING_STAGE = "planning"
TOGETHER = 4
"""Plans that are tried beside one pass of the dense model, where memory allows it."""


def plans_at_once(run: Run, plans: list[Plan]) -> int:
    """Return how many plans are tried beside one pass of the dense model: `TOGETHER`, or as many as fit into memory.

    The number lasts as long as the run, which may go on where less memory is free.
    """
    dense, stage = run.dense, f"{PLANNING_STAGE}-at-once"
    finished = run.state.result(stage)
    if finished:
        return finished[1]["plans"]
    free, neurons = MOST * free_bytes(dense.device), most_neurons(plans)
    fitting = (n for n in range(TOGETHER, 1, -1) if working_bytes(dense.anatomy, run.dtype, neurons, n) < free)
    count = int(run.ranks.decide(torch.tensor(next(fitting, 1), device=dense.device)))
    run.state.finish(stage, {}, {"plans": count})
    return count


def try_plans(
    run: Run, plans: list[Plan], measurement: Measurement, batches: list[Batch], *, number: int = 0, fits: bool = True
) -> list[float]:
    """Measure KL(dense || sliced) of each plan on held-out tokens, in nats per token.

    All plans run beside one pass of the dense model.

    Args:
        run: The run. The trial is saved in its state, and goes on from there.
        plans: Plans with a global basis.
        measurement: Statistics of the dense model.
        batches: Sequences from `holdout.trial_batches`, of all ranks.
        number: Number of the trial, by which the state knows it.
        fits: True if layers are fitted, as in the result. Readers of neurons aren't fitted here, because this takes
            longer.
    """
    dense, state, stage = run.dense, run.state, f"{PLANNING_STAGE}-{number}"
    finished = state.result(stage)
    if finished:
        return finished[1]["kl"]
    cuts = [measurement.cut(dense, plan) for plan in plans]
    fitting = Fitting({batch.group for batch in batches if fits} - {HELD_OUT_GROUP}, ridge=DEFAULT_RIDGE)
    twins = [SlicedTwin(run, cut, fitting, lambda block, tensors: None) for cut in cuts]
    beside = run_beside(
        run,
        batches,
        {f"plan-{index}": twin for index, twin in enumerate(twins)},
        stage=stage,
        position=state.position(stage),
        report=run.report(PLANNING_STAGE, sum(batch.tokens for batch in batches)),
    )
    (before_head,) = deque(beside, maxlen=1)  # the twins are fitted meanwhile
    whole, heads = make_heads(dense, [(cut, twin.reading) for cut, twin in zip(cuts, twins, strict=True)])
    losses = divergences(whole, before_head, [twin.streams for twin in twins], heads, run.ranks)
    state.finish(stage, {}, {"kl": losses})
    return losses
