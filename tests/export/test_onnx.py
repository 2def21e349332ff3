"""ONNX Runtime computes from the folder what transformers computes."""

from pathlib import Path

import pytest

from eigenslice.export import export_model
from eigenslice.export.onnx import OnnxRuntime
from eigenslice.options.exporting import ExportOptions
from tests.conftest import Slicer
from tests.export import models
from tests.export.logits import assert_same_logits, save_two_layers


@pytest.mark.parametrize("case", ["qwen3", "opt", "gemma2"])
def test_sliced_models_give_the_same_logits(case: str, run_slice: Slicer, tmp_path: Path) -> None:
    """At once and token by token, for a stock and a custom result."""
    dense = save_two_layers(case, tmp_path / "dense")
    assert_same_logits(run_slice(case, model=str(dense), width=24).output, tmp_path / "onnx", "onnx", OnnxRuntime)


def test_the_result_is_checked(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "dense")
    result = export_model(ExportOptions(model=str(folder), output=tmp_path / "onnx", to="onnx"))
    assert result.agreement is not None
    assert result.agreement.mean_difference < 1e-3
    assert result.agreement.top1 == 1
