"""Noise of means over few windows."""

import pytest
import torch

from eigenslice.finetune.held_out import WindowLosses, standard_errors


@pytest.mark.parametrize(
    ("count", "quantile"),  # of Student's t with count - 1 degrees of freedom, at the probability of 2 sigma (0.97725)
    [(3, 4.5265), (4, 3.3068), (5, 2.8693), (8, 2.4288), (16, 2.1812), (100, 2.0256)],
)
def test_few_windows_need_more_standard_errors(count: int, quantile: float) -> None:
    assert standard_errors(count) == pytest.approx(quantile, rel=1e-2)


def test_a_rise_that_few_windows_show_by_chance_is_no_rise() -> None:
    def losses(kl: list[float]) -> WindowLosses:
        sums = torch.tensor([[value, 0.0, 0.0, 1.0] for value in kl], dtype=torch.float64)
        return WindowLosses(["text"] * len(kl), sums, 1.0)

    change = [0.0, 0.02, 0.03, 0.04]  # 2.6 standard errors from 0
    assert losses(change).worse_than(losses([0.0] * 4)) == {}
    assert losses(change * 4).worse_than(losses([0.0] * 16)) == {"text": pytest.approx(0.0225)}
