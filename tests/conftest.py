"""Fixtures: dense models are built once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never ask the network

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from eigenslice.options import CalibrationOptions, SliceOptions
from eigenslice.slicing import SliceResult, slice_model
from tests import tiny

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

Slicer = Callable[..., SliceResult]
Recipe = Callable[..., Path]
Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Gives the folder of a case's dense model."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tiny.save(tiny.CASES[name].build(), tmp_path_factory.mktemp(name))
        return folders[name]

    return get


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random token ids."""
    return tiny.calibration_file(tmp_path_factory.mktemp("calibration"))


@pytest.fixture
def run_slice(dense_folder: Folders, calibration: Path, tmp_path: Path) -> Slicer:
    """Slices a case's model into a fresh folder; keywords are options."""

    def run(case: str, **options: Any) -> SliceResult:
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        data = CalibrationOptions(data=str(calibration))
        return slice_model(
            SliceOptions(**{"model": str(dense_folder(case)), "output": output, "calibration": data} | options)
        )

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Writes a recipe; keywords are fields of the plan, the width is the dense model's if none is given."""

    def write(**plan: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"width": tiny.WIDTH} | plan))
        return file

    return write


def load(folder: Path, **kwargs: Any) -> Any:
    """Load a model as a user would."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference as a share of what was expected."""
    return float((actual - expected).norm() / expected.norm())


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def size(model: Any) -> int:
    """Numbers that a model's checkpoint has to hold: parameters and buffers, what is shared once."""
    tensors = {t.data_ptr(): t.numel() for t in model.state_dict().values()}
    return sum(tensors.values())
