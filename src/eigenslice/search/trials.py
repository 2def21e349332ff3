"""Plans tried on held-out calibration tokens: each is fitted on a few sequences and measured on others."""

from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.cut.ends import global_basis
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import dense_head, divergences, sliced_head
from eigenslice.measure.importance import Measurement
from eigenslice.plan.plan import Plan
from eigenslice.stream.run import Run
from eigenslice.stream.walk import STREAMS

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
        fits: Whether layers are fitted, as they will be in the result; not the readers of neurons, which takes longer.
    """
    dense, state, stage = run.dense, run.state, f"{PLANNING_STAGE}-{number}"
    finished = state.result(stage)
    if finished:
        return finished[1]["kl"]
    bases = [global_basis(dense, plan, measurement.spectrum) for plan in plans]
    groups = {batch.group for batch in batches if fits} - {HELD_OUT_GROUP}
    position = state.position(stage)
    sites = run.walk(batches, position=position, hold=True)
    twins = [
        SlicedTwin(
            dense,
            plan,
            basis.site,
            measurement.kept(plan),
            run.dtype,
            lambda block, tensors: None,
            groups=groups,
            ridge=DEFAULT_RIDGE,
            offload=run.offload,
            ranks=run.ranks,
        )
        for plan, basis in zip(plans, bases, strict=True)
    ]
    if position:
        for index, twin in enumerate(twins):
            twin.restore(position, f"plan-{index}", position.content[str(index)])
    report = run.report(PLANNING_STAGE, sum(batch.tokens for batch in batches))
    for site in sites:
        report(site.block)
        for twin in twins:
            if not site.resumed:
                twin.arrive(site)
        if site.passed_block and not any(t.waits(site) for t in twins):
            streams = {STREAMS: site.streams} | {f"plan-{n}": twin.streams for n, twin in enumerate(twins)}
            state.save(stage, site.block, streams, {}, lambda: {str(n): twin.content() for n, twin in enumerate(twins)})
        for twin in twins:
            twin.leave(site)
    heads = [
        sliced_head(dense, plan, basis, twin.reading) for plan, basis, twin in zip(plans, bases, twins, strict=True)
    ]
    losses = divergences(dense_head(dense), site, [twin.streams for twin in twins], heads, run.ranks)
    state.finish(stage, {}, {"kl": losses})
    return losses
