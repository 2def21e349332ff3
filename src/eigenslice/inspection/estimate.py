"""An estimate of a run's time and memory, before it begins."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from eigenslice.algebra.covariance import gram_matrix
from eigenslice.data.batches import Batch
from eigenslice.data.extra_sequences import BEGINNINGS_SHARE
from eigenslice.data.holdout import FIT_TOKENS, TRIAL_TOKENS
from eigenslice.data.tokens import longest_sequence
from eigenslice.fit.neuron_readers import CONJUGATE_GRADIENTS, curvature_stride
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import OWN_SHARE, RANDOM_SHARE
from eigenslice.plan.candidates import DROPS
from eigenslice.plan.forms import choose_form
from eigenslice.plan.plan import Sizes
from eigenslice.search.choose import CANDIDATES
from eigenslice.search.parted import TOKENS as ALLOCATION_TOKENS
from eigenslice.slicing.memory import (
    WRITING,
    activation_bytes,
    gathered_numbers,
    room_for_model,
    shared_training_bytes,
    training_bytes,
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
HEALED_WINDOW = 512
"""Tokens of its windows."""
DEVICES = (2, 4, 8)
"""Numbers of devices that the weights of a healing may be shared among."""
PLANS = 4
"""Least number of plans that are tried, beside plans with fewer blocks: three widths, and one with fewer heads."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of slicing with so many calibration tokens on this machine.

    Attributes:
        tokens: Number of calibration tokens.
        seconds: Time with a global basis and no refit: one pass of the dense model, its covariances, and writing.
        refitted_seconds: Time with text that the model writes, a plan tried and layers refitted (`--keep`).
        bytes: Peak memory without refit: this process, a block being run while the next one is read, the embeddings or
            the activations. On a GPU, a part of it is the device's memory.
        refitted_bytes: Peak memory with refit. It adds one Gram matrix in float64 and its factor, or the whole model,
            which writes text.
        healing_seconds: Time of healing on `HEALED_TOKENS` tokens, with all weights.
        healing_bytes: Peak memory of healing on one device, without the activations.
        shared_healing_bytes: The same on each of several devices that share the weights, by their number.
    """

    tokens: int
    seconds: float
    refitted_seconds: float
    bytes: int
    refitted_bytes: int
    healing_seconds: float
    healing_bytes: int
    shared_healing_bytes: dict[int, int]


def estimate(dense: DenseModel, tokens: int, seqlen: int, dtype: torch.dtype = torch.float32) -> Estimate:
    """Time one block and a covariance on this machine, and count the rest.

    Args:
        dense: The model.
        tokens: Calibration tokens.
        seqlen: Tokens per sequence; attention grows with it.
        dtype: The dtype of the forward pass.
    """
    anatomy, item = dense.anatomy, torch.empty((), dtype=dtype).element_size()
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
    fit = more * share * (block + twin_with_readers) + anatomy.block_count * 2 * broad
    plans = PLANS + (len(DROPS) if anatomy.can_drop_blocks else 0)
    tried = anatomy.block_count * min(more * tokens, TRIED_TOKENS) / probe.tokens
    trial = tried * (2 * block + plans * twin)
    trial += (_allocation(anatomy) + _depth(anatomy)) * anatomy.block_count * block / probe.tokens
    weights = max(anatomy.block_sizes)
    rss = psutil.Process().memory_info().rss
    activations = activation_bytes(anatomy, tokens, dtype)
    vocabulary = anatomy.shapes[anatomy.table.embeddings[0] + ".weight"]
    running = 2 * weights * max(4, item) + 6 * anatomy.width**2 * 8
    plain = rss + activations // 2 + max(running, torch.Size(vocabulary).numel() * item)
    gram = max(anatomy.width, anatomy.neuron_count) ** 2 * 8
    more_activations = activation_bytes(anatomy, tokens, dtype, refitted=True) - activations
    refitted = plain + activations // 2 + more_activations + weights * 8 + 5 * gram // 2
    if writes:
        refitted = max(refitted, rss + whole)
    plain_seconds = measuring + write
    healing = _healing_seconds(anatomy, probe)
    alone, shared = _healing_bytes(anatomy, whole, dtype)
    return Estimate(
        tokens,
        plain_seconds,
        plain_seconds + text + trial + fit,
        plain,
        refitted,
        healing,
        rss + alone,
        {n: rss + size for n, size in shared.items()},
    )


def _healing_seconds(anatomy: Anatomy, probe: "_Probe") -> float:
    """Return the time of healing: the dense model runs forward, the sliced one forward and backward.

    A backward pass takes two forward passes. A part of the tokens is written by the dense model first.
    """
    forward = anatomy.block_count * probe.block
    written = OWN_SHARE / (1 + OWN_SHARE) * WRITING * forward
    return HEALED_TOKENS / probe.tokens * (4 * (forward + probe.head) + written)


def _healing_bytes(anatomy: Anatomy, teacher: int, dtype: torch.dtype) -> tuple[int, dict[int, int]]:
    """Return the bytes of healing on one device, and on each of several devices by their number.

    Args:
        anatomy: The dense model's anatomy.
        teacher: Bytes of the dense model.
        dtype: The dtype of the forward pass.
    """
    outside = sum(anatomy.vocabulary_parameters.values())
    sizes = (
        training_bytes(anatomy.parameters, teacher, 0, 0),
        training_bytes(0, 0, HEALED_WINDOW, anatomy.tokens),
        gathered_numbers(max(anatomy.block_sizes), outside) * dtype.itemsize,
    )
    return shared_training_bytes(*sizes, 1), {n: shared_training_bytes(*sizes, n) for n in DEVICES}


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
    """

    tokens: int
    block: float
    narrow: float
    broad: float
    fold: float
    read: float
    head: float


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

    with torch.no_grad():
        block = _seconds(run_block, dense.device)
        narrow, broad = (_seconds(lambda x=x: gram_matrix(x), dense.device) for x in (rows, wide))
        fold = _seconds(fold_block, dense.device)
        read = _seconds(lambda: rows @ readers.T, dense.device)
        vocabulary = anatomy.shapes[anatomy.table.embeddings[0] + ".weight"][0]
        some = torch.randn(min(vocabulary, HEAD_ROWS), anatomy.width, device=dense.device)
        head = _seconds(lambda: rows @ some.T, dense.device) * vocabulary / len(some)
    return _Probe(ids.numel(), block, narrow, broad, fold, read, head)


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
