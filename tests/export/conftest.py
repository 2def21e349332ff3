"""Fixtures of the GGUF tests: sliced models with a tokenizer that llama.cpp has, and their export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eigenslice.export import Export, export_model
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.exporting import ExportOptions
from tests import tiny
from tests.conftest import Recipe, Slicer
from tests.export import models

Exporter = Callable[..., Export]
Sliced = Callable[..., Path]


@pytest.fixture
def sliced(run_slice: Slicer, recipe: Recipe, tmp_path: Path) -> Sliced:
    """Gives the folder of a case, sliced to a width, or by a recipe where blocks keep neurons of their own number."""

    def run(
        case: str = "llama",
        width: int = 32,
        split: str = "gpt-2",
        neurons: list[int] | None = None,
        heads: int | None = None,
        form: str = "auto",
        experts: int | None = None,
        **config: Any,
    ) -> Path:
        dense = models.save(tmp_path / f"dense-{case}", case, split, **config)
        calibration = tiny.calibration_file(tmp_path, rows=60)
        data = CalibrationOptions(data=str(calibration))
        size: dict[str, Any] = {"width": width, "experts": experts}
        if neurons or heads:
            plan = {"width": width, "neurons": neurons, "key_value_heads": heads, "experts": experts}
            size = {"recipe": recipe(**{name: value for name, value in plan.items() if value})}
        return run_slice("llama", model=str(dense), calibration=data, form=form, **size).output

    return run


@pytest.fixture
def exported(tmp_path: Path) -> Exporter:
    """Exports a folder as GGUF; keywords are options."""

    def run(folder: Path, type_: str = "f32", **options: Any) -> Export:
        output = tmp_path / f"{type_}.gguf"
        return export_model(ExportOptions(model=str(folder), output=output, to="gguf", type=type_, **options))

    return run
