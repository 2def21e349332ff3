"""ONNX Runtime computes from the folder what transformers computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eigenslice.export import export_model
from eigenslice.export.onnx import OnnxRuntime
from eigenslice.options import ExportOptions
from tests import tiny
from tests.conftest import Slicer, load
from tests.export import models

pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed: pip install 'eigenslice[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install 'eigenslice[onnx]'")


@pytest.mark.parametrize("case", ["qwen3", "opt", "gemma2"])
def test_sliced_models_give_the_same_logits(case: str, run_slice: Slicer, tmp_path: Path) -> None:
    """At once and token by token, for a stock and a custom result."""
    folder = run_slice(case, width=24).output
    output = tmp_path / "onnx"
    export_model(ExportOptions(model=str(folder), output=output, to="onnx", check=False))
    ids = tiny.random_ids(1, 12)
    with torch.no_grad():
        expected = load(folder)(ids).logits[0]
    runtime, prompt = OnnxRuntime(output), ids[0].tolist()
    whole = torch.tensor(np.array(runtime.logits(prompt)))
    steps = torch.cat([torch.tensor(np.array(runtime.logits(prompt[: i + 1]))) for i in range(12)])
    for actual in (whole, steps):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_result_is_checked(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "dense")
    result = export_model(ExportOptions(model=str(folder), output=tmp_path / "onnx", to="onnx"))
    assert result.agreement is not None
    assert result.agreement.mean_difference < 1e-3
    assert result.agreement.top1 == 1
