"""OpenVINO computes from the folder what transformers computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eigenslice.errors import EigensliceError
from eigenslice.export import export_model
from eigenslice.export.openvino import BEAM, FILE, OpenVino
from eigenslice.options import ExportOptions
from tests import tiny
from tests.conftest import Slicer, load
from tests.export import models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
openvino = pytest.importorskip("openvino", reason="OpenVINO isn't installed: pip install 'eigenslice[openvino]'")


@pytest.mark.parametrize("case", ["qwen3", "opt"])
def test_sliced_models_give_the_same_logits(case: str, run_slice: Slicer, tmp_path: Path) -> None:
    """At once and token by token, for a stock and a custom result."""
    folder = run_slice(case, width=24).output
    output = tmp_path / "openvino"
    export_model(ExportOptions(model=str(folder), output=output, to="openvino", check=False))
    ids = tiny.random_ids(1, 12)
    with torch.no_grad():
        expected = load(folder)(ids).logits[0]
    runtime, prompt = OpenVino(output), ids[0].tolist()
    whole = torch.tensor(np.array(runtime.logits(prompt)))
    steps = torch.cat([torch.tensor(np.array(runtime.logits(prompt[: i + 1]))) for i in range(12)])
    for actual in (whole, steps):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_go_on_from_the_beam_that_is_named(run_slice: Slicer, tmp_path: Path) -> None:
    folder = run_slice("llama", width=24).output
    output = tmp_path / "openvino"
    export_model(ExportOptions(model=str(folder), output=output, to="openvino", check=False))
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = openvino.Core().compile_model(output / FILE, "CPU", options).create_infer_request()
    ids = tiny.random_ids(2, 7)
    order = torch.tensor([1, 1])
    with torch.no_grad():
        expected = load(folder)(ids[order]).logits[:, -1]
    for start, stop, beams in ((0, 6, [0, 1]), (6, 7, [1, 1])):
        new = ids[:, start:stop] if start == 0 else ids[order, start:stop]
        request.infer(
            {
                "input_ids": new.numpy(),
                "attention_mask": np.ones((2, stop), dtype=np.int64),
                "position_ids": np.arange(start, stop, dtype=np.int64)[None].repeat(2, 0),
                BEAM: np.array(beams, dtype=np.int32),
            }
        )
    actual = torch.tensor(request.get_tensor("logits").data[:, -1])
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_result_is_checked(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "dense")
    output = tmp_path / "openvino"
    result = export_model(ExportOptions(model=str(folder), output=output, to="openvino", type="f16"))
    assert result.agreement is not None
    assert 0 < result.agreement.mean_difference < 0.05
    assert (output / "tokenizer.json").is_file()


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "dense")
    with pytest.raises(EigensliceError, match="--type q8_0 with --to openvino"):
        export_model(ExportOptions(model=str(folder), output=tmp_path / "o", to="openvino", type="q8_0"))
