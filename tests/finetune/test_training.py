"""The arguments of a training: how often it measures itself, its batch and its rate."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.finetune.training import training_arguments
from eigenslice.options.finetuning import LORA_RATE, FinetuneOptions
from tests.conftest import Folders, Slicer
from tests.finetune.conftest import Tuner


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
    options = FinetuneOptions(model="m", output=tmp_path / "o", evaluate_every=every, batch=4, learning_rate=1e-4)
    train = [torch.zeros(8, dtype=torch.long)] * windows
    arguments = training_arguments(options, tmp_path, train, measured, torch.device("cpu"))
    steps = windows // 4
    interval = int(arguments.eval_steps or 0)
    assert -(-steps // interval) == expected
    assert arguments.save_steps == interval


@pytest.mark.parametrize(
    ("given", "windows", "processes", "batch", "rate"),
    [
        ({}, 5000, 1, 4, 1e-3),  # 1250 steps
        ({}, 3100, 1, 3, 1e-3 * 0.75**0.5),  # 1033 steps
        ({}, 10, 1, 1, 5e-4),  # as many steps as there are windows
        ({}, 200, 8, 8, 1e-3),  # one window for each process
        ({"micro_batch": 2}, 10, 1, 2, 1e-3 * 0.5**0.5),
        ({"batch": 16}, 10, 1, 16, 1e-3),
        ({"learning_rate": 0.5}, 10, 1, 1, 0.5),
        ({"full": False}, 10, 1, 1, LORA_RATE / 2),
    ],
)
def test_short_trainings_take_small_steps(
    given: dict[str, Any], windows: int, processes: int, batch: int, rate: float, tmp_path: Path
) -> None:
    options = FinetuneOptions(**{"model": "m", "output": tmp_path / "o", "full": True} | given)
    decided = options.with_batch(windows, processes, width=50)
    assert decided.batch == batch
    assert decided.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(("features", "dtype"), [({}, "float32"), ({"avx512_bf16": True}, "bfloat16")])
def test_a_cpu_trains_in_bfloat16_where_it_multiplies_bfloat16(
    features: dict[str, bool],
    dtype: str,
    dense_folder: Folders,
    run_slice: Slicer,
    tune: Tuner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sliced, teacher = run_slice("llama", width=24).output, str(dense_folder("llama"))
    exact = tune(sliced, teacher=teacher, dtype="float32").manifest["finetune"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    default = tune(sliced, teacher=teacher).manifest["finetune"]
    assert (exact["computed_in"], default["computed_in"]) == ("float32", dtype)
    assert (default["loss"] == exact["loss"]) == (dtype == "float32")
    assert default["perplexity"] == pytest.approx(exact["perplexity"], rel=0.01)
