"""A model that doesn't fit on one device gives what it gives there."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from eigenslice.checkpoint import placing
from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.placing import place_model
from eigenslice.data.own_text import Drawing, draw
from eigenslice.errors import CheckpointError, EigensliceWarning
from eigenslice.evaluation.perplexity import evaluate
from eigenslice.options.calibration_text import CalibrationOptions
from tests import tiny, words
from tests.checkpoint.gguf_file import write_gguf
from tests.conftest import Folders, Slicer
from tests.fake_device import DeviceTensor, fake_device
from tests.results import load

CPU = torch.device("cpu")


def size_of(folder: Path) -> int:
    """Bytes of a model in float32."""
    return sum(4 * parameter.numel() for parameter in load(folder).parameters())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mixtral", "custom", "gguf"])
def test_parts_in_files_predict_and_write_the_same(
    kind: str, dense_folder: Folders, run_slice: Slicer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "custom":
        folder = run_slice("opt", width=24).output
    elif kind == "gguf":
        folder = write_gguf(load(dense_folder("llama")), tmp_path / "model.gguf")
    else:
        folder = dense_folder(kind)
    data = CalibrationOptions(data=str(tiny.calibration_file(tmp_path)))
    expected, whole = evaluate(str(folder), data, "cpu"), load_model(str(folder), "cpu").model
    texts = Drawing(3, 8, 2)
    written = draw(whole, words.tokenizer(), texts)
    room = int(0.6 * sum(4 * parameter.numel() for parameter in whole.parameters()))
    monkeypatch.setattr(placing, "free_bytes", lambda device: room)
    with pytest.warns(EigensliceWarning, match="the rest is read from the disk"):
        found = evaluate(str(folder), data, "cpu")
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    with pytest.warns(EigensliceWarning, match="That is slow"):
        model = load_model(str(folder), "cpu").model
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(draw(model, words.tokenizer(), texts), written)


def test_the_files_go_with_the_model(dense_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are written in the form in which the model holds them."""
    room = int(0.6 * size_of(dense_folder("mixtral")))
    monkeypatch.setattr(placing, "free_bytes", lambda device: room)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(EigensliceWarning):
        model = load_model(str(dense_folder("mixtral")), "cpu").model
    assert list(tmp_path.rglob("*.safetensors"))
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_model_that_fits_goes_to_the_gpu_without_a_stop(dense_folder: Folders) -> None:
    with fake_device() as gpu:
        model = load_model(str(dense_folder("llama")), "cuda").model
        assert all(isinstance(tensor, DeviceTensor) for tensor in (*model.parameters(), *model.buffers()))
        assert gpu.to_device >= size_of(dense_folder("llama"))


def test_parts_on_the_host_predict_the_same(
    dense_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = dense_folder("llama"), CalibrationOptions(data=str(tiny.calibration_file(tmp_path)))
    room = int(0.7 * size_of(folder))
    monkeypatch.setattr(placing, "free_bytes", lambda device: room if device.type == "cuda" else 10**9)
    expected = evaluate(str(folder), data, "cpu")
    with fake_device():
        with pytest.warns(EigensliceWarning, match="fit on the GPU, 0.9 GB into the host's memory"):
            model = load_model(str(folder), "cuda").model
        assert set(model.hf_device_map.values()) == {0, "cpu"}
        with pytest.warns(EigensliceWarning, match="That is slow"):
            found = evaluate(str(folder), data, "cuda")
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_what_a_gpu_has_no_room_for_stays_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 80 * 10**9, "cpu": 100 * 10**9}
    monkeypatch.setattr(placing, "free_bytes", lambda device: free[device.type])
    with fake_device(1):
        one = place_model("small", 60 * 10**9, torch.device("cuda", 1))
        assert one.keywords == {"device_map": {"": torch.device("cuda", 1)}}
        two = place_model("both", 140 * 10**9, torch.device("cuda"))  # without a number: all of them
        assert two.keywords["max_memory"] == {0: 72 * 10**9, 1: 72 * 10**9, "cpu": 90 * 10**9}
        with pytest.warns(EigensliceWarning, match=r"large takes 140.0 GB: 72.0 GB of that fit on the GPU, 90.0 GB"):
            large = place_model("large", 140 * 10**9, torch.device("cuda", 0))
        assert large.keywords["max_memory"] == {0: 72 * 10**9, "cpu": 90 * 10**9}
        with pytest.raises(CheckpointError, match=r"adapter beside 140\.0 GB of weights, and cuda:0 has 80\.0 GB"):
            place_model("tuned", 140 * 10**9, torch.device("cuda", 0), spread=False)
    assert place_model("small", 60 * 10**9, CPU).keywords == {}
