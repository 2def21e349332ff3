"""OpenVINO computes from the folder what transformers computes."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from eigenslice.errors import EigensliceError, ExportError
from eigenslice.export import export_model
from eigenslice.export.openvino import BEAM, FILE, OpenVino
from eigenslice.options.exporting import ExportOptions
from tests import tiny
from tests.conftest import Slicer
from tests.export import models
from tests.export.logits import assert_same_logits, save_two_layers
from tests.messages import check_message
from tests.results import load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own


@pytest.mark.parametrize("case", ["qwen3", "opt", "gemma2", "gemma3_text"])
def test_sliced_models_give_the_same_logits(case: str, run_slice: Slicer, tmp_path: Path) -> None:
    """At once, token by token and from another beam, for stock and custom results; 12 tokens are more than the Gemmas'
    windows of 6. Gemma 2's attention has no operation of its own in OpenVINO, because it caps scores."""
    dense = save_two_layers(case, tmp_path / "dense")
    folder, output = run_slice(case, model=str(dense), width=24).output, tmp_path / "openvino"
    assert_same_logits(folder, output, "openvino", OpenVino)
    assert_rows_go_on_from_the_beam_that_is_named(folder, output)


def assert_rows_go_on_from_the_beam_that_is_named(folder: Path, output: Path) -> None:
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


def test_states_begin_with_the_dense_models_heads(tmp_path: Path) -> None:
    """A state of no heads runs where OpenVINO puts an attention of its own in place, and gives nothing elsewhere."""
    dense, output = save_two_layers("gemma2", tmp_path / "dense"), tmp_path / "openvino"
    export_model(ExportOptions(model=str(dense), output=output, to="openvino", check=False))
    states = [
        node for node in openvino.Core().read_model(output / FILE).get_ops() if node.get_type_name() == "ReadValue"
    ]
    assert len(states) == 2 * 2
    for state in states:
        assert state.get_output_partial_shape(0) == openvino.PartialShape([-1, 2, -1, 12])


@pytest.mark.parametrize("shape", [(0, 0, 96), (1, 2, 96)])
def test_a_file_that_does_not_run_is_refused_and_removed(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Request:
        def __init__(self, *_: object) -> None:
            self.data = np.zeros(shape, dtype=np.float32)

        def reset_state(self) -> None: ...

        def infer(self, inputs: object) -> None: ...

        def get_tensor(self, name: str) -> "Request":
            return self

    folder = models.save(tmp_path / "dense")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr("eigenslice.export.openvino.write_openvino", lambda folder, *_: (folder / FILE).touch())
    monkeypatch.setattr(OpenVino, "__init__", lambda self, path: vars(self).update(_request=Request(), _seen=[]))
    with pytest.raises(ExportError) as caught:
        export_model(ExportOptions(model=str(folder), output=tmp_path / "openvino", to="openvino"))
    check_message(
        caught.value, "the runtime of --to openvino doesn't run this 'llama' model", f"logits of shape {shape}"
    )
    assert set(tmp_path.rglob("*")) == before


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "dense")
    with pytest.raises(EigensliceError, match="--type q8_0 with --to openvino"):
        export_model(ExportOptions(model=str(folder), output=tmp_path / "o", to="openvino", type="q8_0"))
