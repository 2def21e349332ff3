"""Fixtures: dense models are built once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never ask the network

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import SliceResult, slice_model
from tests import tiny

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

Slicer = Callable[..., SliceResult]
Recipe = Callable[..., Path]
Folders = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk() -> Iterator[None]:
    """Let `os.fsync` return at once: a slice calls it 28 times, and no test cuts the power (see test_durable.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def every_cpu_computes_in_float32() -> Iterator[None]:
    """Hide what this CPU multiplies fast: products of bfloat16 would differ from references on some machines only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


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


@pytest.fixture(scope="session")
def none_held_out(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    """Random token ids in too few sequences to hold one out: the pass that measures a loss is left out."""
    return CalibrationOptions(data=str(tiny.calibration_file(tmp_path_factory.mktemp("few"), rows=7)))


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
