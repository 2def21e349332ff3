"""Groups of a layer's inputs, ranked by what the others can't make up for."""

import pytest
import torch
from torch import Tensor

from eigenslice.algebra.elimination import rank_groups

RIDGE = 0.1


def error(gram: Tensor, weight: Tensor, kept: list[int]) -> float:
    """min |Y - W A|^2 + r |W - W0|^2 over W that read only some inputs, solved directly."""
    level = RIDGE * gram.diagonal().mean()
    regular = gram + level * torch.eye(len(gram), dtype=gram.dtype)
    part = torch.zeros_like(weight)
    right = weight @ gram[:, kept] + level * weight[:, kept]
    part[:, kept] = torch.linalg.solve(regular[kept][:, kept], right.T).T
    change = weight - part
    return float((change @ regular * change).sum())


@pytest.mark.parametrize("seed", range(4))
def test_each_group_that_goes_is_the_one_that_is_missed_least(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, 20, generator=generator, dtype=torch.float64) @ mixed
    gram, weight = inputs.T @ inputs, torch.randn(6, 20, generator=generator, dtype=torch.float64)
    order = rank_groups(gram, weight, 5, RIDGE).tolist()
    assert sorted(order) == list(range(5))
    for count in range(4, 0, -1):
        before = order[: count + 1]
        errors = {}
        for out in before:
            kept = [i for g in sorted(set(before) - {out}) for i in range(4 * g, 4 * g + 4)]
            errors[out] = error(gram, weight, kept)
        assert min(errors, key=errors.__getitem__) == order[count]


def test_a_copy_of_another_group_goes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 9, generator=generator, dtype=torch.float64)
    inputs[:, 6:] = 3 * inputs[:, :3]
    order = rank_groups(inputs.T @ inputs, torch.randn(4, 9, generator=generator, dtype=torch.float64), 3, 1e-6)
    assert order[-1] in (0, 2)
    assert 1 in order[:2]
