"""The parts that all passes of one run share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eigenslice.data import Tokens
from eigenslice.data.batches import Batch, share_batches
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import Offload
from eigenslice.runtime.progress import Progress
from eigenslice.runtime.ranks import Ranks
from eigenslice.runtime.run_state import RunState
from eigenslice.stream.walk import Stream


@dataclass(frozen=True)
class Run:
    """What the passes of one run share."""

    dense: DenseModel
    tokens: Tokens
    dtype: torch.dtype
    offload: Offload
    ranks: Ranks
    state: RunState
    progress: Progress

    def stream(self) -> Stream:
        """The dense stream, for one more pass; the activations of the one before are gone then."""
        self.offload.reset()
        return Stream(self.dense, self.dtype, self.offload)

    @property
    def batches(self) -> list[Batch]:
        """This rank's calibration sequences."""
        return share_batches(self.tokens.batches, self.ranks)

    def report(self, stage: str, tokens: int | None = None) -> Callable[[int], None]:
        """Progress of a stage in which tokens go through all blocks; None are all tokens."""
        count = self.tokens.count if tokens is None else tokens
        return lambda block: self.progress(stage, block, self.dense.blocks, count)
