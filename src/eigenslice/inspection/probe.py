"""Times of parts of the work of slicing on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from eigenslice.algebra.covariance import add_gram
from eigenslice.algebra.refit import NormalEquations, RidgeChoice
from eigenslice.data.batches import Batch
from eigenslice.data.tokens import longest_sequence
from eigenslice.inspection.work import Work
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.precision import choose_precision, products
from eigenslice.slicing.memory import WRITING
from eigenslice.stream.walk import Stream

PROBE_TOKENS = 512
"""Tokens that a block is timed on."""
HEAD_ROWS = 4096
"""Tokens of the vocabulary that the head is timed on."""
MOST_INPUTS = 1024
"""Inputs of a regression that is timed; larger ones are computed from it."""


@dataclass(frozen=True)
class Probe:
    """Times of parts of the work, in seconds.

    Attributes:
        tokens: Number of tokens that ran.
        block: A block.
        narrow, broad: The Gram matrix of a site's stream, and of the wider of stream and neurons.
        square: A product with a matrix as large as the width, (D, D).
        product: A product with a matrix as large as the MLP's writer, in the precision of the neurons' fit.
        head: A product with the head.
        fold: Folding a block's weights.
        narrow_fit, broad_fit: Choosing a ridge and solving a regression, with the stream and with the wider of stream
            and neurons as inputs.
    """

    tokens: int
    block: float
    narrow: float
    broad: float
    square: float
    product: float
    head: float
    fold: float
    narrow_fit: float
    broad_fit: float

    @classmethod
    def of(cls, dense: DenseModel, seqlen: int, dtype: torch.dtype) -> "Probe":
        """Time parts of the work on a few tokens.

        Args:
            dense: The model.
            seqlen: Tokens per sequence; attention grows with it.
            dtype: The dtype of the forward pass.
        """
        anatomy, device = dense.anatomy, dense.device
        length = min(seqlen, longest_sequence(dense.config) or seqlen, PROBE_TOKENS)
        ids = torch.zeros(PROBE_TOKENS // length, length, dtype=torch.long)
        site = next(iter(Stream(dense, dtype).walk([Batch(ids)])))
        batch = site.activations[0]
        broad = max(anatomy.width, anatomy.neuron_count)
        rows, wide, square, writer, head = (
            torch.randn(*shape, device=device)
            for shape in (
                (ids.numel(), anatomy.width),
                (ids.numel(), broad),
                (anatomy.width, anatomy.width),
                (broad, anatomy.width),
                (min(anatomy.tokens, HEAD_ROWS), anatomy.width),
            )
        )

        def run_block() -> None:
            for index in range(len(anatomy.sites)):
                site.layer.update(index, site.layer.normalize(index, batch.hidden), **batch.kwargs[0])

        def fold_block() -> None:
            for _ in dense.block(0).values():
                pass

        def timed(work: Callable[[], object]) -> float:
            return faster_of_two(work, device)

        precision = choose_precision(device)
        with torch.no_grad(), products(precision.forward):
            times = {
                "block": timed(run_block),
                "fold": timed(fold_block),
                "square": timed(lambda: rows @ square),
                "head": timed(lambda: rows @ head.T) * anatomy.tokens / len(head),
            }
            with products(precision.gram):
                for name, inputs in (("narrow", rows), ("broad", wide)):
                    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64, device=device)
                    times[name] = timed(partial(add_gram, total, inputs))
            with products(precision.neurons):
                times["product"] = timed(lambda: rows @ writer.T)
            for name, size in (("narrow_fit", anatomy.width), ("broad_fit", broad)):
                times[name] = _fit_seconds(dense, size, precision.solve_dtype)
        return cls(ids.numel(), **times)

    def seconds(self, work: Work) -> float:
        """Return the time of some work."""
        of_tokens = (
            self.block * (work.blocks + WRITING * work.written)
            + self.narrow * work.narrow
            + self.broad * work.broad
            + self.square * work.squares
            + self.product * work.neurons
            + self.head * work.head
        )
        return of_tokens / self.tokens + self.narrow_fit * work.narrow_fits + self.broad_fit * work.broad_fits


def _fit_seconds(dense: DenseModel, inputs: int, dtype: torch.dtype) -> float:
    """Time the choice of a ridge and the solution of a regression without tokens; large ones grow by the cube."""
    size = min(inputs, MOST_INPUTS)
    outputs = max(1, dense.anatomy.width * size // inputs)
    base = torch.zeros(outputs, size, dtype=torch.float64, device=dense.device)

    def fit() -> None:
        sums = NormalEquations.zeros(size, outputs, dense.device)
        sums.gram.diagonal().fill_(1.0)
        sums.solve(base, RidgeChoice().choose(sums, [], base), dtype)

    return faster_of_two(fit, dense.device) * (inputs / size) ** 3


def faster_of_two(work: Callable[[], object], device: torch.device) -> float:
    """The faster of two runs, in seconds: the first one may have to wait for memory."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)
