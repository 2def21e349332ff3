"""An estimate of a run's time and memory, before it begins."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eigenslice.algebra.covariance import gram_matrix
from eigenslice.algebra.refit import RIDGES, NormalEquations, RidgeChoice
from eigenslice.data.batches import Batch
from eigenslice.data.extra_sequences import BEGINNINGS_SHARE
from eigenslice.data.holdout import FIT_TOKENS, TRIAL_TOKENS
from eigenslice.data.tokens import longest_sequence
from eigenslice.fit.neuron_readers import CONJUGATE_GRADIENTS, curvature_stride
from eigenslice.inspection.healing_need import HealingMemory, healing_memory
from eigenslice.inspection.memory_need import Memory, MemoryNeed, memory_need
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import OWN_SHARE, RANDOM_SHARE
from eigenslice.plan.candidates import DROPS
from eigenslice.plan.forms import choose_form
from eigenslice.plan.plan import Sizes
from eigenslice.runtime.precision import choose_precision, products
from eigenslice.search.choose import CANDIDATES
from eigenslice.search.parted import TOKENS as ALLOCATION_TOKENS
from eigenslice.slicing.memory import (
    WRITING,
    room_for_model,
    whole_bytes,
)
from eigenslice.stream.walk import Stream

PROBE_TOKENS = 512
"""Tokens that a block is timed on."""
TRIED_TOKENS = FIT_TOKENS + TRIAL_TOKENS
HEALED_TOKENS = 100_000
"""Tokens of the healing that is estimated."""
HEAD_ROWS = 4096
"""Tokens of the vocabulary that the head is timed on."""
MOST_INPUTS = 1024
"""Inputs of a regression that is timed; larger ones are computed from it."""
BUS_PROBE = 64 * 1024**2
"""Bytes of the copy that is timed."""
PASSES = 5
"""Passes of the dense model in which weights cross the bus: measuring, depth, two of trials, and the last one."""
STREAMS_OF_A_BLOCK = 12
"""Streams that cross the bus for a block where activations live on the host: 8 up and 4 down."""
PLANS = 4
"""Least number of plans that are tried, beside plans with fewer blocks: three widths, and one with fewer heads."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of slicing with so many calibration tokens on this machine.

    Attributes:
        tokens: Number of calibration tokens.
        seconds: Time with a global basis and no refit: one pass of the dense model, its covariances, and writing.
        refitted_seconds: Time with text that the model writes, a plan tried and layers refitted (`--keep`).
        solving_seconds: The part of `refitted_seconds` in which regressions are solved.
        bus_seconds: The part in which weights and activations cross to a GPU and back, if nothing else goes on
            meanwhile.
        memory: Peak memory without refit.
        refitted_memory: Peak memory with refit.
        advice: What doesn't fit into the free memory, and which option makes it fit.
        healing_seconds: Time of healing on `HEALED_TOKENS` tokens, with all weights.
        healing_memory: Peak memory of healing.
    """

    tokens: int
    seconds: float
    refitted_seconds: float
    solving_seconds: float
    bus_seconds: float
    memory: Memory
    refitted_memory: Memory
    advice: list[str]
    healing_seconds: float
    healing_memory: HealingMemory


def estimate(dense: DenseModel, tokens: int, seqlen: int, dtype: torch.dtype = torch.float32) -> Estimate:
    """Time one block and a covariance on this machine, and count the rest.

    Args:
        dense: The model.
        tokens: Calibration tokens.
        seqlen: Tokens per sequence; attention grows with it.
        dtype: The dtype of the forward pass.
    """
    anatomy = dense.anatomy
    probe = _probe(dense, seqlen, dtype)
    sites, block, narrow, broad = len(anatomy.sites), probe.block, probe.narrow, probe.broad
    share = anatomy.block_count * tokens / probe.tokens
    write = anatomy.block_count * probe.fold * 3  # folded to be run; folded again to be sliced, and written
    measuring = share * (block + sites * narrow)
    # The model's own text; plans tried on some of the tokens, in two passes; and a pass of two streams with their
    # products and solutions
    whole = whole_bytes(dense, dtype)
    writes = whole <= room_for_model(dense.device)
    text = OWN_SHARE * (measuring + share * WRITING * block) if writes else 0.0
    more = (1 + (OWN_SHARE if writes else RANDOM_SHARE)) * (1 + BEGINNINGS_SHARE)
    twin = block + 2 * sites * narrow + 2 * broad
    # Readers of neurons are fitted by products as large as their own, three for each gradient, and run again
    twin_with_readers = twin + (3 + CONJUGATE_GRADIENTS / curvature_stride(tokens) * 3 + 4) * probe.read
    fit = more * share * (block + twin_with_readers)
    plans = PLANS + (len(DROPS) if anatomy.can_drop_blocks else 0)
    tried = anatomy.block_count * min(more * tokens, TRIED_TOKENS) / probe.tokens
    trial = tried * (2 * block + plans * twin)
    trial += (_allocation(anatomy) + _depth(anatomy)) * anatomy.block_count * block / probe.tokens
    # Readers at each site, and the writers of attention and of the MLP; in a trial, ridges aren't chosen
    solves = anatomy.block_count * ((2 * sites - 1) * probe.narrow_fit + probe.broad_fit)
    solving = solves * (1 + plans / (1 + len(RIDGES)))
    need = memory_need(dense, tokens, dtype)
    bus = _bus_seconds(dense, int(more * tokens), dtype, need)
    plain_seconds = measuring + write
    return Estimate(
        tokens=tokens,
        seconds=plain_seconds,
        refitted_seconds=plain_seconds + text + trial + fit + solving + bus,
        solving_seconds=solving,
        bus_seconds=bus,
        memory=need.plain,
        refitted_memory=need.refitted,
        advice=need.advice(dense.device),
        healing_seconds=_healing_seconds(anatomy, probe),
        healing_memory=healing_memory(anatomy, whole, dtype),
    )


def _bus_seconds(dense: DenseModel, tokens: int, dtype: torch.dtype, need: MemoryNeed) -> float:
    """Return the time of copies to a GPU and back: weights in each pass, and activations that live on the host."""
    if dense.device.type != "cuda":
        return 0.0
    piece = torch.empty(BUS_PROBE, dtype=torch.uint8)
    rate = BUS_PROBE / _seconds(lambda: piece.to(dense.device), dense.device)
    weights = PASSES * dense.anatomy.parameters * dense.dtype.itemsize
    streams = 0 if need.place == "device" else tokens * dense.anatomy.width * dtype.itemsize
    return (weights + STREAMS_OF_A_BLOCK * dense.anatomy.block_count * streams) / rate


def _healing_seconds(anatomy: Anatomy, probe: "_Probe") -> float:
    """Return the time of healing: the dense model runs forward, the sliced one forward and backward.

    A backward pass takes two forward passes. A part of the tokens is written by the dense model first.
    """
    forward = anatomy.block_count * probe.block
    written = OWN_SHARE / (1 + OWN_SHARE) * WRITING * forward
    return HEALED_TOKENS / probe.tokens * (4 * (forward + probe.head) + written)


@dataclass(frozen=True)
class _Probe:
    """Times of parts of the work on this machine, in seconds.

    Attributes:
        tokens: Number of tokens that ran.
        block: A block.
        narrow, broad: The Gram matrix of a site's stream, and of the wider of stream and neurons.
        fold: Folding a block's weights.
        read: A product with the readers of an MLP.
        head: A product with the head.
        narrow_fit, broad_fit: Choosing a ridge and solving a regression, with the stream and with the wider of stream
            and neurons as inputs.
    """

    tokens: int
    block: float
    narrow: float
    broad: float
    fold: float
    read: float
    head: float
    narrow_fit: float
    broad_fit: float


def _probe(dense: DenseModel, seqlen: int, dtype: torch.dtype) -> _Probe:
    """Time parts of the work on a few tokens."""
    longest = longest_sequence(dense.config) or seqlen
    length = min(seqlen, longest, PROBE_TOKENS)
    ids = torch.zeros(PROBE_TOKENS // length, length, dtype=torch.long)
    anatomy = dense.anatomy
    site = next(iter(Stream(dense, dtype).walk([Batch(ids)])))
    batch = site.activations[0]
    rows = torch.randn(ids.numel(), anatomy.width, device=dense.device)
    wide = torch.randn(ids.numel(), max(anatomy.width, anatomy.neuron_count), device=dense.device)
    readers = torch.randn(anatomy.neuron_rows, anatomy.width, device=dense.device)

    def run_block() -> None:
        for index in range(len(anatomy.sites)):
            site.layer.update(index, site.layer.normalize(index, batch.hidden), **batch.kwargs[0])

    def fold_block() -> None:
        for _ in dense.block(0).values():
            pass

    precision = choose_precision(dense.device)
    with torch.no_grad(), products(precision.forward):
        block = _seconds(run_block, dense.device)
        fold = _seconds(fold_block, dense.device)
        vocabulary = anatomy.shapes[anatomy.table.embeddings[0] + ".weight"][0]
        some = torch.randn(min(vocabulary, HEAD_ROWS), anatomy.width, device=dense.device)
        head = _seconds(lambda: rows @ some.T, dense.device) * vocabulary / len(some)
        with products(precision.gram):
            narrow, broad = (_seconds(lambda x=x: gram_matrix(x), dense.device) for x in (rows, wide))
        with products(precision.neurons):
            read = _seconds(lambda: rows @ readers.T, dense.device)
        fits = [_fit_seconds(dense, size, precision.solve_dtype) for size in (anatomy.width, wide.shape[1])]
    return _Probe(ids.numel(), block, narrow, broad, fold, read, head, *fits)


def _fit_seconds(dense: DenseModel, inputs: int, dtype: torch.dtype) -> float:
    """Time the choice of a ridge and the solution of a regression without tokens; large ones grow by the cube."""
    size = min(inputs, MOST_INPUTS)
    outputs = max(1, dense.anatomy.width * size // inputs)
    base = torch.zeros(outputs, size, dtype=torch.float64, device=dense.device)

    def fit() -> None:
        sums = NormalEquations.zeros(size, outputs, dense.device)
        sums.gram.diagonal().fill_(1.0)
        sums.solve(base, RidgeChoice().choose(sums, [], base), dtype)

    return _seconds(fit, dense.device) * (inputs / size) ** 3


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The faster of two runs: the first one may have to wait for memory."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _allocation(anatomy: Anatomy) -> float:
    """Tokens that pass all blocks so that each block gets neurons of its own, for results in the custom class."""
    if not anatomy.neuron_count or anatomy.expert_count:
        return 0.0
    if choose_form(anatomy, Sizes(anatomy.width, anatomy.neuron_count // 2), tied=True).stock:
        return 0.0
    return TRIED_TOKENS + ALLOCATION_TOKENS * anatomy.block_count / 2  # a stream more behind each block


def _depth(anatomy: Anatomy) -> float:
    """Return the number of tokens that pass all blocks to find the least missed blocks."""
    if not anatomy.can_drop_blocks:
        return 0.0
    return TRIED_TOKENS + ALLOCATION_TOKENS * CANDIDATES / 2
