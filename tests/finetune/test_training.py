"""The arguments of a training: how often it measures itself."""

from pathlib import Path

import pytest
import torch

from eigenslice.finetune.training import training_arguments
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.finetuning import FinetuneOptions


@pytest.mark.parametrize(
    ("windows", "measured", "every", "expected"),
    [
        (400, 16 * 8, None, 10),  # ten times 128 tokens are less than 0.4 of 3200
        (40, 32, None, 4),  # 0.4 of 320 tokens are 4 times 32; 10 steps: each third, and the last
        (8, 64, None, 1),  # never more than once, where 0.4 of 64 tokens are less than 64
        (40, 32, 2, 5),  # as the user says
    ],
)
def test_measuring_takes_a_fifth_of_the_time_at_most(
    windows: int, measured: int, every: int | None, expected: int, tmp_path: Path
) -> None:
    options = FinetuneOptions(
        model="m", output=tmp_path / "o", evaluate_every=every, data=CalibrationOptions(data="builtin", samples=windows)
    )
    train = [torch.zeros(8, dtype=torch.long)] * windows
    arguments = training_arguments(options, tmp_path, train, measured, 1e-4, torch.device("cpu"))
    steps = windows // 4
    assert -(-steps // int(arguments.eval_steps)) == expected
    assert arguments.save_steps == arguments.eval_steps
