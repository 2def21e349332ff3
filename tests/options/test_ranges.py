"""Numbers out of range end in a message that names the option and the range."""

import math
from pathlib import Path
from typing import Any

import pytest

from eigenslice.errors import OptionsError
from eigenslice.finetune import FinetuneOptions
from eigenslice.inspection.inspect import inspect_model
from eigenslice.options.benchmark import BenchOptions
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.evaluation import TaskOptions
from eigenslice.options.sampling import SampleOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.report import ReportOptions
from tests.messages import check_message

HERE = Path()
GIVEN: dict[type[Any], dict[str, Any]] = {
    CalibrationOptions: {},
    SliceOptions: {"model": "m", "output": HERE / "o", "keep": 0.5},
    FinetuneOptions: {"model": "m", "output": HERE / "o"},
    BenchOptions: {},
    SampleOptions: {"model": "m", "output": HERE / "o.json"},
    TaskOptions: {"tasks": ("piqa",)},
    ReportOptions: {"folder": HERE},
}
"""What each needs, beside the option in question."""
COUNTS = (-1, 10**30)
SHARES = (math.nan, math.inf, -math.inf, -1.0, 1e308)
WRONG: list[tuple[type[Any], str, tuple[float, ...]]] = [
    (CalibrationOptions, "samples", (0, 10**12, *COUNTS)),
    (CalibrationOptions, "seqlen", (1, 10**9, *COUNTS)),
    (CalibrationOptions, "seed", COUNTS),
    (SliceOptions, "keep", (0.0, *SHARES)),
    (SliceOptions, "slicing", (1.0, *SHARES)),
    (SliceOptions, "own_text", SHARES),
    (SliceOptions, "random_tokens", SHARES),
    (SliceOptions, "multiple", (0, *COUNTS)),
    (SliceOptions, "shard_gib", (0.0, 1e-300, *SHARES)),
    (FinetuneOptions, "distill", SHARES),
    (FinetuneOptions, "rank", (0, *COUNTS)),
    (FinetuneOptions, "alpha", (0.0, *SHARES)),
    (FinetuneOptions, "dropout", (1.0, *SHARES)),
    (FinetuneOptions, "epochs", (0.0, 1e-300, *SHARES)),
    (FinetuneOptions, "batch", (0, *COUNTS)),
    (FinetuneOptions, "micro_batch", (0, *COUNTS)),
    (FinetuneOptions, "learning_rate", (0.0, *SHARES)),
    (FinetuneOptions, "warmup", (1.0, *SHARES)),
    (FinetuneOptions, "weight_decay", SHARES),
    (FinetuneOptions, "held_out", (0, *COUNTS)),
    (FinetuneOptions, "evaluate_every", (0, *COUNTS)),
    (FinetuneOptions, "patience", (0, *COUNTS)),
    (FinetuneOptions, "shard_gib", (0.0, *SHARES)),
    (BenchOptions, "prompt", (1, *COUNTS)),
    (BenchOptions, "new", (1, 10**9, *COUNTS)),
    (BenchOptions, "batch", (0, *COUNTS)),
    (BenchOptions, "runs", (0, *COUNTS)),
    (BenchOptions, "seed", COUNTS),
    (SampleOptions, "samples", (0, 10**12, *COUNTS)),
    (SampleOptions, "seqlen", (1, *COUNTS)),
    (SampleOptions, "batch", (0, *COUNTS)),
    (SampleOptions, "temperature", (0.0, 1e-300, *SHARES)),
    (SampleOptions, "seed", COUNTS),
    (TaskOptions, "fewshot", COUNTS),
    (TaskOptions, "limit", (0, *COUNTS)),
    (TaskOptions, "batch", (0, *COUNTS)),
    (ReportOptions, "new", (0, 10**9, *COUNTS)),
]


@pytest.mark.parametrize(
    ("kind", "name", "values"), WRONG, ids=lambda value: getattr(value, "__name__", str(value))[:20]
)
def test_numbers_out_of_range(kind: type[Any], name: str, values: tuple[float, ...]) -> None:
    flag = {"shard_gib": "shard-size"}.get(name, name.replace("_", "-"))
    kept = {key: value for key, value in GIVEN[kind].items() if not (key == "keep" and name == "slicing")}
    for value in values:
        with pytest.raises(OptionsError) as caught:
            kind(**kept | {name: value})
        check_message(caught.value)
        assert f"--{flag} {value}" in caught.value.found


@pytest.mark.parametrize("kind", GIVEN, ids=lambda kind: kind.__name__)
def test_the_defaults_are_in_range(kind: type[Any]) -> None:
    assert kind(**GIVEN[kind]).model_dump()


def test_texts_that_no_memory_holds() -> None:
    with pytest.raises(OptionsError, match="--samples 1000000 --seqlen 10000"):
        SampleOptions(model="m", output=HERE / "o.json", samples=10**6, seqlen=10**4)


@pytest.mark.parametrize("numbers", [{"samples": 0}, {"seqlen": 0}, {"samples": 10**30}])
def test_inspecting_with_absurd_numbers(numbers: dict[str, Any]) -> None:
    (flag,) = numbers
    with pytest.raises(OptionsError, match=f"--{flag}"):
        inspect_model("no such model", **numbers)
