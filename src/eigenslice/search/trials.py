"""Plans tried on held-out calibration tokens: each is fitted on a few sequences and measured on others."""

from collections import deque

from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.fit.beside import run_beside
from eigenslice.fit.ridges import Fitting
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import divergences, make_heads
from eigenslice.measure.importance import Measurement
from eigenslice.plan.plan import Plan
from eigenslice.stream.run import Run

PLANNING_STAGE = "planning"


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
