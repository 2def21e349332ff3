import math

import pytest
import torch

from eigenslice.algebra.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(value: float, dtype: torch.dtype) -> None:
    numbers = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(numbers)
    for index in (0, 70, 149):
        broken = numbers.clone()
        broken.view(-1)[index] = value
        assert not all_finite(broken)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0, 4))
