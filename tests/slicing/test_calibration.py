"""Sequences beside the calibration texts, against text that the dense model writes itself."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.checkpoint.source import open_source
from eigenslice.data import own_text
from eigenslice.data.batches import BESIDE_GROUP, Batch
from eigenslice.data.own_text import Drawing, draw
from eigenslice.errors import EigensliceWarning, OptionsError
from eigenslice.measure.importance import measure
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.offload import free_bytes
from eigenslice.slicing import calibration, memory, slice_model
from eigenslice.stream.run import Run
from tests import tiny, words
from tests.checkpoint.files import copy_of
from tests.conftest import Folders, Slicer
from tests.fake_device import fake_device
from tests.messages import check_message
from tests.results import load


@pytest.fixture
def model(dense_folder: Folders, tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """400 words."""
    file = tmp_path / "words.txt"
    file.write_text(words.text(tiny.random_ids(1, 400)[0].tolist()))
    return file


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The sequences that the dense model is measured on."""
    batches: list[Batch] = []

    def spy(run: Run, **options: bool) -> Any:
        batches.extend(run.tokens.batches)
        return measure(run, **options)

    monkeypatch.setattr("eigenslice.slicing.slice.measure", spy)
    return batches


def test_slicing_calibrates_on_own_text_too(model: Path, text: Path, run_slice: Slicer, seen: list[Batch]) -> None:
    data = CalibrationOptions(data=str(text), samples=12, seqlen=30, seed=3)
    result = run_slice("llama", model=str(model), width=24, calibration=data)
    assert result.manifest["calibration"]["sequences"] == 12
    assert result.manifest["calibration"]["own_sequences"] == 6
    assert "random_sequences" not in result.manifest["calibration"]
    own = max(batch.group for batch in seen)
    quarters = {0, 1, 2, 3}  # of the only text
    assert {batch.group for batch in seen if batch.group != own} == quarters | {BESIDE_GROUP}
    drawn = torch.cat([batch.input_ids for batch in seen if batch.group == own])
    assert torch.equal(drawn, draw(load(model), words.tokenizer(), Drawing(6, 30, 64, seed=3)))


def test_a_long_sequence_holds_several_own_texts(
    model: Path, text: Path, run_slice: Slicer, seen: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "OWN_LENGTH", 8)
    data = CalibrationOptions(data=str(text), samples=10, seqlen=40)
    run_slice("llama", model=str(model), width=24, calibration=data, own_text=0.2, random_tokens=0.3)
    groups = sorted({batch.group for batch in seen})
    assert groups == [BESIDE_GROUP, 0, 1, 2, 3, 4]
    assert [tuple(batch.input_ids.shape) for batch in seen if batch.group == 4] == [(2, 40)]
    drawn = draw(load(model), words.tokenizer(), Drawing(10, 8, 64))
    assert torch.equal(torch.cat([batch.input_ids for batch in seen if batch.group == 4]), drawn.view(2, 40))


@pytest.mark.parametrize(
    ("gigabytes", "free", "writes"),
    [(16, 80, True), (2, 20, True), (16, 24, False), (140, 80, False)],
    ids=["8 B on a large card", "0.5 B on a small machine", "8 B on a small card", "70 B"],
)
def test_a_model_writes_where_half_of_the_free_memory_is_enough(
    gigabytes: int, free: int, writes: bool, dense_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "whole_bytes", lambda dense, dtype: gigabytes * 10**9)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free * 10**9)
    monkeypatch.setattr(calibration, "free_bytes", lambda device: free * 10**9)
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    with nullcontext() if writes else pytest.warns(EigensliceWarning, match=f"50 % of the {free}.0 GB that are free"):
        assert calibration._has_room(dense, None, torch.bfloat16) == writes
    if gigabytes <= free:
        assert calibration._has_room(dense, 0.25, torch.bfloat16)  # it was asked for
    else:
        with pytest.raises(OptionsError, match=r"--own-text 0\.25"):
            calibration._has_room(dense, 0.25, torch.bfloat16)


def test_memory_of_the_model_that_wrote_is_free_again(model: Path, text: Path, run_slice: Slicer) -> None:
    data = CalibrationOptions(data=str(text), samples=12, seqlen=30)
    with fake_device() as gpu:
        run_slice("llama", model=str(model), width=24, calibration=data, device="cuda")
        assert gpu.emptied == 1
        assert free_bytes(gpu.device) == gpu.total
        reserved = torch.zeros(100, device="cuda").nbytes
        with patch.object(torch.cuda, "memory_reserved", lambda device: reserved):  # by torch, for its next tensors
            assert free_bytes(gpu.device) == gpu.total + reserved


@pytest.mark.parametrize("short", ["half isn't enough", "little is free"])
def test_without_room_for_the_model_random_tokens_take_its_place(
    short: str, model: Path, text: Path, run_slice: Slicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if short == "half isn't enough":
        monkeypatch.setattr(calibration, "room_for_model", lambda device: 1000)
    else:
        monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
        monkeypatch.setattr(calibration, "free_bytes", lambda device: 100_000)
    data = CalibrationOptions(data=str(text), samples=12, seqlen=30)
    with pytest.warns(EigensliceWarning, match="no text of the model's own"):
        result = run_slice("llama", model=str(model), width=24, calibration=data)
    assert "own_sequences" not in result.manifest["calibration"]
    assert result.manifest["calibration"]["random_sequences"] == 3
    if short == "half isn't enough":
        asked = run_slice("llama", model=str(model), width=24, calibration=data, own_text=0.25)
        assert asked.manifest["calibration"]["own_sequences"] == 3
    else:
        with pytest.raises(OptionsError) as caught:
            run_slice("llama", model=str(model), width=24, calibration=data, own_text=0.25)
        check_message(caught.value, "--own-text 0.25")


@pytest.mark.parametrize("options", [{"own_text": 0.0}, {"refit": False}], ids=["not wanted", "nothing is fitted"])
def test_no_own_text(model: Path, text: Path, run_slice: Slicer, options: dict[str, Any]) -> None:
    data = CalibrationOptions(data=str(text), samples=12, seqlen=30)
    result = run_slice("llama", model=str(model), width=24, calibration=data, **options)
    assert "own_sequences" not in result.manifest["calibration"]


def test_an_interrupted_run_goes_on_with_the_same_own_text(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CalibrationOptions(data=str(text), samples=12, seqlen=30)
    options = SliceOptions(model=str(model), output=tmp_path / "whole", width=24, calibration=data)
    slice_model(options)

    def stop(stage: str, done: int, total: int, tokens: int = 0) -> None:
        if stage == "measuring":
            raise KeyboardInterrupt

    stopped = options.model_copy(update={"output": tmp_path / "stopped"})
    with pytest.raises(KeyboardInterrupt):
        slice_model(stopped, stop)
    monkeypatch.delattr(calibration, "write_rows")  # it isn't written again
    slice_model(stopped.model_copy(update={"resume": True}))
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
