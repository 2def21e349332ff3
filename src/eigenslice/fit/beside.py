"""The loop that runs sliced models beside the dense one, and fits them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from eigenslice.data.batches import Batch
from eigenslice.fit.twin import SlicedTwin
from eigenslice.runtime.run_state import Position
from eigenslice.stream.run import Run
from eigenslice.stream.walk import STREAMS, Site


def run_beside(
    run: Run,
    batches: list[Batch],
    twins: Mapping[str, SlicedTwin],
    *,
    stage: str,
    position: Position | None,
    report: Callable[[int], None],
    content: Callable[[], dict[str, Any]] = dict,
) -> Iterator[Site]:
    """Run sliced models beside one pass of the dense model, and yield each site of the dense stream.

    A site is yielded between two fits of the sliced layers: the writers before the site, and the readers at it. Behind
    a block, the position is saved in between, unless a twin is without the block that comes next.

    Args:
        run: The run.
        batches: The sequences of all ranks.
        twins: The sliced models, by the names of their streams in the saved state.
        stage: Name of the pass in the saved state.
        position: The position to go on from, None at the beginning.
        report: Function that is called with the number of the current block.
        content: Function that gives further content of the saved state.
    """
    sites = run.walk(batches, position=position, hold=True, unnormed=True)
    if position:
        for name, twin in twins.items():
            twin.restore(position, name, position.content["fits"][name])

    def saved() -> dict[str, Any]:
        return {"fits": {name: twin.content() for name, twin in twins.items()}} | content()

    for site in sites:
        report(site.block)
        if not site.resumed:
            for twin in twins.values():
                twin.fit_writers_before(site)
        yield site
        if site.passed_block and not any(twin.is_dropped_at(site) for twin in twins.values()):
            streams = {STREAMS: site.streams} | {name: twin.streams for name, twin in twins.items()}
            run.state.save(stage, site.block, streams, {}, saved)
        for twin in twins.values():
            twin.fit_readers_at(site)
