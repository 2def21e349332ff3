"""The loss of a run's result on held-out text, however the result is made.

Nothing is fitted on held-out sequences but the gain before the head. The basis and the plan are chosen with them.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from eigenslice.cut.ends import GlobalCut
from eigenslice.data.batches import Batch, share_batches
from eigenslice.data.holdout import HELD_OUT_SHARE, hold_out
from eigenslice.fit.beside import run_beside
from eigenslice.fit.ridges import Fitting
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import Head, make_heads
from eigenslice.measure.loss import held_out_texts, measure_loss, next_tokens, not_measured, predicting_rows
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.run_state import Position
from eigenslice.stream.run import Run
from eigenslice.stream.walk import Site

LOSS_STAGE = "evaluating"
PREDICTING_STAGE = "predicting"
"""Stage in which both heads predict held-out text; its steps are batches."""
WHOLE_STREAMS = "whole"
"""Name of the streams that nothing is cut from, in a saved state."""


def loss_beside(
    run: Run,
    batches: list[Batch],
    site: Site,
    streams: OffloadedTensors,
    heads: tuple[Head, Head],
    gain: Tensor | None = None,
) -> dict[str, Any]:
    """Measure the loss of a sliced model that has run beside the dense one.

    Args:
        run: The run.
        batches: The sequences that have run, of all ranks; texts in the held-out group count.
        site: The site before the head, with the dense streams.
        streams: The sliced streams there.
        heads: The dense and the sliced model's head.
        gain: The gain before the head, (width,), or None.

    Returns:
        The manifest's entry.
    """
    whole, head = heads
    if gain is not None:
        head = replace(head, reading=head.reading * gain.to(head.reading))
    texts = list(held_out_texts(share_batches(batches, run.ranks)))

    def rows() -> Iterator[tuple[Batch, Tensor, Tensor]]:
        for done, (number, batch) in enumerate(texts):
            run.progress(PREDICTING_STAGE, done, len(texts))
            yield batch, site.activations[number].hidden, streams[number]
        run.progress(PREDICTING_STAGE, len(texts), len(texts))

    return _loss(run, whole, head, rows())


def unfitted_loss(run: Run, cut: GlobalCut) -> dict[str, Any]:
    """Measure the loss of a cut of which nothing is fitted, in a pass over the held-out sequences alone.

    Args:
        run: The run. The loss is saved in its state, and goes on from there.
        cut: Widths, basis, and what is kept in each block.

    Returns:
        The manifest's entry.
    """
    finished = run.state.result(LOSS_STAGE)
    if finished:
        return finished[1]
    batches = [batch for _, batch in held_out_texts(hold_out(run.tokens.batches))]
    if batches:
        twin = SlicedTwin(run, cut, Fitting(frozenset()), lambda block, tensors: None)
        beside = run_beside(
            run,
            batches,
            {"sliced": twin},
            stage=LOSS_STAGE,
            position=run.state.position(LOSS_STAGE),
            report=run.report(LOSS_STAGE, sum(batch.tokens for batch in batches)),
        )
        (before_head,) = deque(beside, maxlen=1)  # the twin's head is made meanwhile
        whole, (head,) = make_heads(run.dense, [(cut, twin.reading)])
        loss = loss_beside(run, batches, before_head, twin.streams, (whole, head))
    else:
        loss = _none()
    run.state.finish(LOSS_STAGE, {}, loss)
    return loss


class WholeStreams:
    """The dense streams of held-out texts, beside a walk that keeps only a part of its own streams at each site."""

    def __init__(self, run: Run, batches: list[Batch]) -> None:
        """Nothing is computed yet.

        Args:
            run: The run.
            batches: The sequences of the walk, of all ranks.
        """
        self._run, self._texts = run, list(held_out_texts(share_batches(batches, run.ranks)))
        self.streams = run.offload.tensors()

    def restore(self, position: Position) -> None:
        """Go on at a saved position."""
        position.restore(WHOLE_STREAMS, self.streams)

    def begin(self, site: Site) -> None:
        """Take the streams at the first site, before a part is cut."""
        for number, _ in self._texts:
            self.streams.append(site.activations[number].hidden)

    def pass_on(self, site: Site) -> None:
        """Let the streams pass the sublayers at a site."""
        for place, (number, _) in enumerate(self._texts):
            self.streams[place] = site.pass_on(site.activations[number], self.streams[place])

    def loss(self, site: Site) -> dict[str, Any]:
        """Measure the loss at the site before the head, where the walk's streams are those of the sliced model.

        The sliced model's head reads the kept part of the stream as the dense head does, so that both heads are one.

        Returns:
            The manifest's entry.
        """
        head, _ = make_heads(self._run.dense)
        rows = (
            (batch, self.streams[place], site.activations[number].hidden)
            for place, (number, batch) in enumerate(self._texts)
        )
        return _loss(self._run, head, head, rows)


def _loss(run: Run, whole: Head, head: Head, texts: Iterable[tuple[Batch, Tensor, Tensor]]) -> dict[str, Any]:
    """Return the manifest's entry for two heads, and a batch with its dense and its sliced stream before the head."""
    eps = run.dense.anatomy.eps
    predictions = (
        (predicting_rows(batch, dense, eps), predicting_rows(batch, sliced, eps), next_tokens(batch))
        for batch, dense, sliced in texts
    )
    loss = measure_loss(whole, head, predictions, run.ranks)
    return _none() if loss is None else loss.describe()


def _none() -> dict[str, Any]:
    """Return the manifest's entry where no text was held out."""
    return not_measured(
        f"no sequence was held out, for there were fewer than {HELD_OUT_SHARE} sequences or too few tokens"
    )
