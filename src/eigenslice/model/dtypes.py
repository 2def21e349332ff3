"""The dtype of a checkpoint with tensors in several dtypes."""

from collections import Counter
from collections.abc import Iterable
from statistics import mode
from typing import Any

import torch

from eigenslice.checkpoint.weights import Weights

Counts = Counter[torch.dtype]


def count_dtypes(weights: Weights, names: Iterable[str]) -> Counts:
    """Count the numbers that some tensors of a checkpoint store in each dtype; each name counts once."""
    counts: Counts = Counter()
    for name in set(names):
        dtype = weights.dtype(name)
        assert dtype is not None  # integers were refused before
        counts[dtype] += torch.Size(weights.shape(name)).numel()
    return counts


def prevailing(counts: Counts, blocks: Counts, config: Any) -> torch.dtype:
    """Return the dtype of a checkpoint. One large tensor, such as the embedding, may not decide alone.

    Two of three dtypes have to agree: of most numbers, of most numbers in the blocks, and of the config. If none agree,
    most numbers decide.

    Args:
        counts: Count of numbers in each dtype.
        blocks: The same for the decoder layers.
        config: Its `dtype`, if it has one, also decides between dtypes of equally many numbers.
    """
    named = getattr(config, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    most, inner = (_most(found, named) for found in (counts, blocks))
    votes = [most, inner, most if named not in counts else named]
    return mode(votes)


def _most(counts: Counts, preferred: Any) -> torch.dtype:
    return max(counts, key=lambda dtype: (counts[dtype], dtype == preferred))


def short_name(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def describe(counts: Counts) -> str:
    """Numbers in each dtype, in words."""
    return ", ".join(f"{count:,} numbers in {short_name(dtype)}" for dtype, count in counts.most_common())
