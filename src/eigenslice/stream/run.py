"""The parts that all passes of one run share."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from eigenslice.arch import Sublayer
from eigenslice.data import Tokens
from eigenslice.data.batches import Batch, share_batches
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import Offload
from eigenslice.runtime.precision import EXACT, Precision
from eigenslice.runtime.progress import Progress
from eigenslice.runtime.ranks import Ranks
from eigenslice.runtime.run_state import Position, RunState
from eigenslice.stream.walk import Observer, Site, Stream


@dataclass(frozen=True)
class Run:
    """The model, the data and the machine of one run, which all its passes share.

    Attributes:
        dense: The dense model.
        tokens: The calibration sequences of all ranks.
        dtype: The dtype of the forward pass.
        offload: Where activations live between blocks.
        ranks: The processes that share the sequences.
        state: The saved state, with the results of finished stages.
        progress: Called as the work goes on.
        precision: The precision of each kind of arithmetic.
    """

    dense: DenseModel
    tokens: Tokens
    dtype: torch.dtype
    offload: Offload
    ranks: Ranks
    state: RunState
    progress: Progress
    precision: Precision = EXACT

    def walk(
        self,
        batches: list[Batch],
        observe: Observer | None = None,
        observed: Collection[Sublayer] = (),
        *,
        position: Position | None = None,
        hold: bool = False,
        unnormed: bool = False,
    ) -> Iterator[Site]:
        """Begin one more pass of the dense model, as `Stream.walk`. The activations of the pass before are removed.

        All passes go through here, so that sequences are shared over ranks in one place.

        Args:
            batches: The sequences of all ranks. This rank runs its share.
            observe: Function that sees writers' inputs, see `Stream.walk`.
            observed: Sublayers that it sees.
            position: The position to go on from; None is the beginning.
            hold: True to keep a block's weights in memory while the stream passes it.
            unnormed: True to keep the inputs of post norms.
        """
        self.offload.reset()
        stream = Stream(self.dense, self.dtype, self.offload)
        shared = share_batches(batches, self.ranks)
        return stream.walk(shared, observe, observed, position=position, hold=hold, unnormed=unnormed)

    def report(self, stage: str, tokens: int | None = None) -> Callable[[int], None]:
        """Return a function that reports the number of the current block of a stage.

        Args:
            stage: Name of the stage.
            tokens: Tokens that pass all blocks; None is all calibration tokens.
        """
        count = self.tokens.count if tokens is None else tokens
        return lambda block: self.progress(stage, block, self.dense.anatomy.block_count, count)
