"""Plans tried on held-out calibration tokens: each is fitted on a few sequences and measured on others."""

from collections.abc import Callable

from eigenslice.algebra.basis import Spectrum
from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.cut.ends import global_basis
from eigenslice.data.batches import HELD_OUT_GROUP, Batch, share_batches
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import dense_head, divergences, sliced_head
from eigenslice.measure.importance import Measurement
from eigenslice.model.dense import DenseModel
from eigenslice.plan.plan import Plan
from eigenslice.runtime.ranks import ALONE, Ranks
from eigenslice.runtime.run_state import RunState
from eigenslice.stream.walk import STREAMS, Stream


def try_plans(
    dense: DenseModel,
    plans: list[Plan],
    spectrum: Spectrum,
    measurement: Measurement,
    batches: list[Batch],
    stream: Stream,
    progress: Callable[[int], None] = lambda block: None,
    state: RunState | None = None,
    ranks: Ranks = ALONE,
    stage: str = "planning",
    fit: bool = True,
) -> list[float]:
    """KL(dense || sliced) of each plan on held-out tokens, in nats per token.

    All plans run beside one pass of the dense model.

    Args:
        dense: The model.
        plans: Plans with a global basis.
        spectrum: Principal components of the stream.
        measurement: What the first pass found.
        batches: From `holdout.trial_batches`; of all ranks.
        stream: The dense model's.
        progress: Called with the number of each block.
        state: Where to save what is found, and to go on from; None saves nothing.
        ranks: Who share the batches.
        stage: Name of this trial in the state.
        fit: Whether layers are fitted, as they will be in the result; not what neurons read, which takes longer.
    """
    finished = state.result(stage) if state else None
    if finished:
        return finished[1]["kl"]
    bases = [global_basis(dense, plan, spectrum) for plan in plans]
    groups = {batch.group for batch in batches if fit} - {HELD_OUT_GROUP}
    twins = [
        SlicedTwin(
            dense,
            plan,
            basis.site,
            measurement.kept(plan),
            stream.dtype,
            lambda block, tensors: None,
            groups=groups,
            ridge=DEFAULT_RIDGE,
            offload=stream.offload,
            ranks=ranks,
        )
        for plan, basis in zip(plans, bases, strict=True)
    ]
    position = state.position(stage) if state else None
    if position:
        for number, twin in enumerate(twins):
            twin.restore(position, f"plan-{number}", position.content[str(number)])
    for site in stream.walk(share_batches(batches, ranks), position=position, hold=True):
        progress(site.block)
        for twin in twins:
            if not site.resumed:
                twin.arrive(site)
        if state and site.index == 0 and site.block and not site.resumed and not any(t.waits(site) for t in twins):
            streams = {STREAMS: site.streams} | {f"plan-{n}": twin.streams for n, twin in enumerate(twins)}
            state.save(stage, site.block, streams, {}, lambda: {str(n): twin.content() for n, twin in enumerate(twins)})
        for twin in twins:
            twin.leave(site)
    heads = [
        sliced_head(dense, plan, basis, twin.reading) for plan, basis, twin in zip(plans, bases, twins, strict=True)
    ]
    losses = divergences(dense_head(dense), site, [twin.streams for twin in twins], heads, ranks)
    if state:
        state.finish(stage, {}, {"kl": losses})
    return losses
