"""Fixtures: a sliced model, something to learn, and what an uninterrupted training makes of both."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from eigenslice.finetune import FinetuneOptions, FinetuneResult, finetune
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.output import partial_path
from eigenslice.slicing import slice_model
from tests import tiny
from tests.conftest import Folders

Tuner = Callable[..., FinetuneResult]
SHORT: dict[str, Any] = {
    "held_out": 4,
    "batch": 4,
    "device": "cpu",
    "full": False,
    "learning_rate": 1e-2,
    "rank": 2,
    "evaluate_every": 2,
}
"""Eight steps, with a checkpoint at every second one."""


@pytest.fixture
def data(tmp_path: Path) -> CalibrationOptions:
    """Token ids that a model can learn something of."""
    return token_ids(tmp_path, 44)


def token_ids(folder: Path, count: int) -> CalibrationOptions:
    """So many windows of them, in a file in a folder."""
    path = folder / "train.safetensors"
    save_file({"calibration": tiny.structured_ids(count, 16, seed=5)}, path)
    return CalibrationOptions(data=str(path))


@pytest.fixture
def tune(data: CalibrationOptions, tmp_path: Path) -> Tuner:
    """Trains a folder; keywords are options."""

    def run(model: Path, **options: Any) -> FinetuneResult:
        output = tmp_path / f"tuned-{len(list(tmp_path.iterdir()))}"
        defaults = {
            "output": output,
            "data": data,
            "held_out": 4,
            "batch": 4,
            "device": "cpu",
            "learning_rate": 1e-2,
            "full": False,
        }
        return finetune(FinetuneOptions(**{"model": str(model), **defaults} | options))

    return run


@dataclass(frozen=True)
class Training:
    """A short training.

    Attributes:
        options: Its options; the output isn't there.
        expected: Content of the files that it makes when nothing disturbs it.
        interrupted: The work folder that it leaves when it is interrupted at its seventh step.
    """

    options: FinetuneOptions
    expected: dict[str, bytes]
    interrupted: Path

    def at(self, output: Path, **changed: Any) -> FinetuneOptions:
        """The options with an output, and others that are changed."""
        return self.options.model_copy(update={"output": output, "resume": True} | changed)

    def interrupt(self, output: Path) -> Path:
        """Let a training with this output have been interrupted; gives the folder of its checkpoints."""
        return Path(shutil.copytree(self.interrupted, partial_path(output))) / "state"

    def check(self, output: Path) -> None:
        """The output is that of an undisturbed training, to the byte, and nothing else is left of it."""
        actual = contents(output)
        assert {n: c for n, c in actual.items() if n not in NAMED} == self.expected
        assert not partial_path(output).exists()


NAMED = ("eigenslice.json", "README.md")
"""Files that name the output."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def training(dense_folder: Folders, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A short training of adapters."""
    return make_training(dense_folder, calibration, tmp_path_factory.mktemp("training"))


def make_training(
    dense_folder: Folders, calibration: Path, folder: Path, case: str = "llama", **options: Any
) -> Training:
    """A short training; keywords are options."""
    model = folder / "sliced"
    text = CalibrationOptions(data=str(calibration))
    slice_model(SliceOptions(model=str(dense_folder(case)), output=model, width=24, calibration=text, refit=False))
    values: dict[str, Any] = {"model": str(model), "data": token_ids(folder, 20), "output": folder / "out"}
    chosen = FinetuneOptions(**values | {"epochs": 2, "dropout": 0.3} | SHORT | options)
    finetune(chosen)
    expected = {name: content for name, content in contents(folder / "out").items() if name not in NAMED}
    again = chosen.model_copy(update={"output": folder / "interrupted"})
    with pytest.raises(KeyboardInterrupt):
        finetune(again, interrupt_at("training", 7))
    return Training(chosen, expected, partial_path(again.output))


def interrupt_at(stage: str, done: int) -> Callable[[str, int, int], None]:
    """A progress that raises KeyboardInterrupt."""

    def progress(name: str, step: int, total: int) -> None:
        if (name, step) == (stage, done):
            raise KeyboardInterrupt

    return progress
