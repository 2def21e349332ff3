"""The order of heads' rows, against the reshapes of transformers' code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eigenslice.arch.heads import BY_HEAD, KEYS, QUERIES, QUERIES_KEYS_VALUES, HeadCounts, HeadRows

WIDTH = 2


def numbered(count: int, start: int) -> torch.Tensor:
    """Rows of heads, (count, WIDTH), that are all different."""
    return torch.arange(count * WIDTH).reshape(count, WIDTH) + start


def parts(kv: int, group: int) -> dict[str, torch.Tensor]:
    """Rows of queries (kv, group, WIDTH), keys and values (kv, 1, WIDTH)."""
    queries = numbered(kv * group, 0).unflatten(0, (kv, group))
    return {"q": queries, "k": numbered(kv, 1000)[:, None], "v": numbered(kv, 2000)[:, None]}


def kept_parts(whole: dict[str, torch.Tensor], queries: list[list[int]]) -> dict[str, torch.Tensor]:
    group = whole["q"].shape[1]
    heads = [of[0] // group for of in queries]
    flat = whole["q"].flatten(0, 1)
    return {"q": torch.stack([flat[of] for of in queries]), "k": whole["k"][heads], "v": whole["v"][heads]}


def one_after_the_other(p: dict[str, torch.Tensor]) -> torch.Tensor:
    """Phi-3 and GPT-2: `qkv[..., :queries]`, then keys, then values."""
    return torch.cat([p[name].flatten(0, 1) for name in "qkv"])


def by_head(p: dict[str, torch.Tensor]) -> torch.Tensor:
    """Falcon: `view(kv heads, group + 2, head_dim)`; GPT-NeoX: `view(heads, 3 * head_dim).chunk(3)`."""
    return torch.cat([p["q"], p["k"], p["v"]], dim=1).flatten(0, 1)


def by_core(p: dict[str, torch.Tensor]) -> torch.Tensor:
    """CodeGen: `reshape(4, -1).split(local_dim)` gives queries, values, keys."""
    return torch.cat([p[name].unflatten(0, (4, -1)).flatten(1, 3) for name in "qvk"], dim=1).reshape(-1, WIDTH)


@pytest.mark.parametrize(
    ("rows", "made", "kv", "group", "queries"),
    [
        (QUERIES_KEYS_VALUES, one_after_the_other, 3, 2, [[0, 1], [4, 5]]),
        (QUERIES_KEYS_VALUES, one_after_the_other, 1, 4, [[0, 2, 3]]),
        (QUERIES_KEYS_VALUES, one_after_the_other, 3, 2, [[1], [4]]),
        (BY_HEAD, by_head, 3, 2, [[0, 1], [4, 5]]),
        (BY_HEAD, by_head, 3, 3, [[0, 2], [7, 8]]),
        (BY_HEAD, by_head, 1, 4, [[1, 3]]),
        (HeadRows("qvk", blocks=4), by_core, 8, 1, [[1], [2], [4], [7]]),
        (QUERIES, lambda p: p["q"].flatten(0, 1), 3, 2, [[2], [5]]),
        (KEYS, lambda p: p["k"].flatten(0, 1), 3, 2, [[2], [5]]),
    ],
)
def test_the_kept_rows_are_the_rows_of_the_kept_heads(
    rows: HeadRows, made: Callable[[Any], torch.Tensor], kv: int, group: int, queries: list[list[int]]
) -> None:
    whole, counts = parts(kv, group), HeadCounts(kv, group)
    dense, expected = made(whole), made(kept_parts(whole, queries))
    assert dense[rows.kept(counts, queries)].tolist() == expected.tolist()
    fewer = HeadCounts(len(queries), len(queries[0]))
    assert rows.resized(dense.numel(), counts, fewer) == expected.numel()
