"""The work of slicing, counted in what a machine can be timed on: passes of blocks, products, solutions.

Counts are those of a dense transformer with an MLP in each block. Sizes of the result are those of `KEPT` of the
parameters, all of the cut in neurons.
"""

from dataclasses import dataclass, fields

from eigenslice.algebra.refit import RIDGES
from eigenslice.data.extra_sequences import BEGINNINGS_SHARE
from eigenslice.data.holdout import FIT_TOKENS, HELD_OUT_SHARE, HELD_OUT_TOKENS, TRIAL_TOKENS
from eigenslice.fit.gain import PASSES
from eigenslice.fit.neuron_readers import CONJUGATE_GRADIENTS, curvature_stride
from eigenslice.model.anatomy import Anatomy
from eigenslice.options.slicing import OWN_SHARE, RANDOM_SHARE
from eigenslice.plan.candidates import DROPS
from eigenslice.plan.forms import choose_form
from eigenslice.plan.plan import Sizes
from eigenslice.search.choose import CANDIDATES
from eigenslice.search.parted import TOKENS as PARTED_TOKENS
from eigenslice.search.trials import TOGETHER

KEPT = 0.75
"""Share of the parameters that the counts are for."""
PLANS = 4
"""Number of plans that are tried, beside plans with fewer blocks: the kinds of cut, and narrower widths while they
gain."""
SOLVED = 1 / (1 + len(RIDGES))
"""Time of a regression with a given ridge over that of one whose ridge is chosen."""
LEAST_NEURONS = 0.25
"""Least share of neurons that the counts assume."""
HEAD_PRODUCTS = 1 + 2
"""Products with a head for each token whose dense and sliced predictions are compared: the dense ones take two."""


@dataclass(frozen=True)
class Work:
    """The work of a stage.

    Attributes:
        blocks: Tokens that pass a block, over all blocks.
        written: Tokens that the model writes, over all blocks.
        squares: Tokens that are multiplied by a matrix as large as the width, (D, D).
        narrow, broad: Tokens of Gram matrices, of the stream and of the neurons.
        neurons: Tokens that are multiplied by a matrix as large as the MLP's writer, (D, neurons), where neurons are
            fitted.
        head: Tokens that are multiplied by the head.
        narrow_fits, broad_fits: Regressions from the stream and from the neurons that are solved and whose ridge is
            chosen; a regression with a given ridge is a part of one.
    """

    blocks: float = 0.0
    written: float = 0.0
    squares: float = 0.0
    narrow: float = 0.0
    broad: float = 0.0
    neurons: float = 0.0
    head: float = 0.0
    narrow_fits: float = 0.0
    broad_fits: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def times(self, factor: float) -> "Work":
        """Return so many times the work."""
        return Work(**{field.name: factor * getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class _Sizes:
    """What the counts depend on.

    Attributes:
        blocks, sites: Numbers of blocks, and of sites in a block.
        left_out: Largest number of blocks that a plan leaves out.
        share: Share of a block's work that the result keeps.
        neurons: Share of its neurons that the result keeps; 0 without neurons that can be cut.
        kinds: Rows of the MLP's readers for each neuron.
    """

    blocks: int
    sites: int
    left_out: int
    share: float
    neurons: float
    kinds: float

    @classmethod
    def of(cls, anatomy: Anatomy) -> "_Sizes":
        """Count them."""
        in_blocks = sum(anatomy.block_sizes)
        share = max(LEAST_NEURONS, 1 - (1 - KEPT) * anatomy.parameters / in_blocks)
        kinds = anatomy.neuron_rows / max(1, anatomy.neuron_count)
        mlps = anatomy.block_count * anatomy.neuron_count * anatomy.width * (1 + kinds)
        neurons = max(LEAST_NEURONS, 1 - (1 - share) * in_blocks / mlps) if mlps else 0.0
        cut_blocks = (1 - KEPT) * anatomy.parameters * anatomy.block_count / in_blocks
        left_out = round(DROPS[-1] * cut_blocks) if anatomy.can_drop_blocks else 0
        return cls(anatomy.block_count, len(anatomy.sites), left_out, share, neurons, kinds)


def work_by_stage(anatomy: Anatomy, tokens: int, *, writes: bool) -> dict[str, Work]:
    """Count the work of `slice --keep` with all defaults.

    Args:
        anatomy: The model's anatomy.
        tokens: Tokens of the calibration texts.
        writes: True if the model writes text of its own; else random tokens join the texts.
    """
    sizes, passed = _Sizes.of(anatomy), passing_tokens(tokens, writes=writes)
    measured = passed / (1 + BEGINNINGS_SHARE)
    drops = min(len(DROPS), sizes.left_out)
    stages = {
        "measuring": measuring_work(anatomy, measured),
        "depth": _depth(sizes) if drops else Work(),
        "allocating": _allocation(sizes) if _is_uneven(anatomy) else Work(),
        "planning": _trials(sizes, min(passed, FIT_TOKENS + TRIAL_TOKENS), PLANS + drops),
        "slicing": _last_pass(sizes, passed),
        "head": _head(min(HELD_OUT_TOKENS, measured / HELD_OUT_SHARE)),
    }
    return ({"sampling": Work(written=anatomy.block_count * OWN_SHARE * tokens)} if writes else {}) | stages


def kept_neurons(anatomy: Anatomy) -> int:
    """Return how many neurons the counted result keeps in an MLP."""
    return round(_Sizes.of(anatomy).neurons * anatomy.neuron_count)


def passing_tokens(tokens: int, *, writes: bool) -> int:
    """Return how many tokens pass in the last pass: texts, the model's own or random ones, and beginnings."""
    return int((1 + BEGINNINGS_SHARE) * (1 + (OWN_SHARE if writes else RANDOM_SHARE)) * tokens)


def measuring_work(anatomy: Anatomy, tokens: float) -> Work:
    """The pass that finds the basis."""
    count = anatomy.block_count * tokens
    return Work(blocks=count, narrow=len(anatomy.sites) * count)


def _twin(sizes: _Sizes) -> Work:
    """A token in a block of a sliced model that is fitted beside the dense one; the dense one's work isn't in it.

    Readers of each site and writers behind it: a Gram matrix of their inputs, a product with their outputs, and the
    target, which is the dense stream in the basis.
    """
    return Work(
        blocks=sizes.share,
        narrow=2 * sizes.sites - 1,
        broad=sizes.neurons**2,
        squares=3 * sizes.sites - 1 + sizes.neurons,
    )


def _regressions(sizes: _Sizes) -> Work:
    """The regressions of all blocks, for the readers at each site and the writers behind it."""
    return Work(narrow_fits=2 * sizes.sites - 1, broad_fits=sizes.neurons**3).times(sizes.blocks)


def _readers(sizes: _Sizes, stride: int) -> Work:
    """A token of the fit of neurons' readers (`neuron_readers`), in products of the size of the writer.

    Of all tokens: readers run before and behind the step, and their gradient; the writer's error before and behind it,
    and its way back. Of one token in `stride`, for each conjugate gradient: forward, the writer's square, backward.
    """
    products = 3 * sizes.kinds + 3 + CONJUGATE_GRADIENTS * (2 * sizes.kinds + 2) / stride
    return Work(neurons=products * sizes.neurons, squares=2, narrow=1)


def _last_pass(sizes: _Sizes, tokens: float) -> Work:
    each = Work(blocks=1, squares=1) + _twin(sizes)
    if sizes.neurons:
        each += _readers(sizes, curvature_stride(int(tokens)))
    return each.times(sizes.blocks * tokens) + _regressions(sizes)


def _trials(sizes: _Sizes, tokens: float, plans: int) -> Work:
    """Plans that are tried; their ridge is given, and readers of neurons aren't fitted."""
    twin = _twin(sizes).times(sizes.blocks * tokens)
    solutions = _regressions(sizes).times(SOLVED)
    passes = -(-plans // TOGETHER)
    dense = Work(blocks=sizes.blocks * tokens * passes)
    heads = Work(head=min(TRIAL_TOKENS, tokens / 3) * (2 * passes + plans))
    return (twin + solutions).times(plans) + dense + heads


def _depth(sizes: _Sizes) -> Work:
    """Each block is left out alone, with the writer before it fitted; the streams of the nearest run to the head."""
    count = min(2 * sizes.left_out + CANDIDATES, sizes.blocks - 1)
    fitted = Work(blocks=1, broad=1, squares=1).times(sizes.blocks * FIT_TOKENS)
    beside = count * (sizes.blocks - count / 2)  # a stream more behind each block, until there are so many
    parted = Work(blocks=PARTED_TOKENS * (sizes.blocks + beside), head=PARTED_TOKENS * (2 + count))
    return fitted + parted + Work(broad_fits=sizes.blocks * SOLVED)


def _allocation(sizes: _Sizes) -> Work:
    """Behind each block one more stream parts from the dense one, and all run to the head."""
    fitted = Work(blocks=2, broad=1).times(sizes.blocks * FIT_TOKENS)
    parted = Work(blocks=sizes.blocks**2 / 2 * PARTED_TOKENS, head=PARTED_TOKENS * (2 + sizes.blocks))
    return fitted + parted + Work(broad_fits=sizes.blocks * SOLVED)


def _head(tokens: float) -> Work:
    """The gain before the head, two products a step and three for the dense side, and the loss of the result."""
    return Work(head=tokens * (3 + 2 * (PASSES - 1) + HEAD_PRODUCTS))


def _is_uneven(anatomy: Anatomy) -> bool:
    """Return whether results have numbers of neurons by block: those in the custom class, without experts."""
    if not anatomy.neuron_count or anatomy.expert_count:
        return False
    return not choose_form(anatomy, Sizes(anatomy.width, anatomy.neuron_count // 2), tied=True).stock
