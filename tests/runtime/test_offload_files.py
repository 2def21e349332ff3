"""The place of activations. Files are removed as soon as nobody needs them: their peak doesn't grow with the blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenslice.checkpoint.source import open_source
from eigenslice.fit.neuron_readers import curvature_stride
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.offload import Offload, OffloadedTensors, Place, choose_place
from eigenslice.slicing import slice_model
from eigenslice.slicing.memory import activation_bytes
from tests import tiny

ROWS, TOKENS = 8, 32
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MLPs": ({"width": 24, "neurons": 40}, {}),
    "mixtures": ({"width": 24, "neurons": 16}, {"num_local_experts": 4}),
    "per block": ({"width": 24, "basis": "per-block"}, {}),
}


@pytest.mark.parametrize(
    ("device", "needed", "working", "expected"),
    [
        ("cuda", 40, 40, "device"),
        ("cuda", 40, 60, "host"),  # it would fit alone
        ("cuda", 60, 0, "host"),
        ("cuda", 600, 0, "disk"),
        ("cpu", 400, 400, "device"),
        ("cpu", 400, 600, "disk"),
    ],
)
def test_activations_leave_room_for_the_rest(
    device: str, needed: int, working: int, expected: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"cuda": 100, "cpu": 1000}
    monkeypatch.setattr("eigenslice.runtime.offload.free_bytes", lambda device: free[device.type])
    assert choose_place("auto", needed, torch.device(device), working) == expected


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Most bytes of files at any time, so far."""
    largest, put = [0], OffloadedTensors._put

    def watched(tensors: OffloadedTensors, index: int, tensor: Tensor) -> Tensor | Path:
        result = put(tensors, index, tensor)
        assert tensors._folder is not None
        largest[0] = max(largest[0], folder_bytes(tensors._folder.parent))
        return result

    monkeypatch.setattr(OffloadedTensors, "_put", watched)
    return largest


@pytest.mark.parametrize("run", RUNS)
def test_the_peak_is_that_of_one_block(run: str, peak: list[int], tmp_path: Path) -> None:
    options, more = RUNS[run]
    peaks = []
    for blocks in (2, 5):
        config = tiny.LLAMA | {"num_hidden_layers": blocks} | more
        model = tiny.save(tiny.tiny_model("mixtral" if more else "llama", config), tmp_path / str(blocks))
        data = CalibrationOptions(data=str(tiny.calibration_file(tmp_path, ROWS, TOKENS)))
        out = tmp_path / f"out-{blocks}"
        peak[0] = 0
        slice_model(SliceOptions(model=str(model), output=out, calibration=data, offload="disk", **options))
        peaks.append(peak[0])
    assert peaks[0] == peaks[1]
    anatomy = DenseModel(open_source(str(model))).anatomy
    assert curvature_stride(ROWS * TOKENS) == 1
    needed = activation_bytes(anatomy, ROWS * TOKENS, torch.float32, refitted="basis" not in options)
    assert 0.25 * needed < peaks[0] < 1.3 * needed  # headers of the files, and what is replaced in one step


def test_files_go_with_their_tensors(tmp_path: Path) -> None:
    offload = Offload("disk", torch.device("cpu"), tmp_path)
    some, others = offload.tensors(), offload.tensors()
    some.append(torch.ones(3))
    others.append(torch.ones(3))
    others.save(tmp_path / "saved")
    del others
    assert len(list(tmp_path.glob("0*/*"))) == 1
    assert torch.equal(some[0], torch.ones(3))
    again = offload.tensors()
    again.restore(tmp_path / "saved")  # a saved state has files of its own
    assert torch.equal(again[0], torch.ones(3))
