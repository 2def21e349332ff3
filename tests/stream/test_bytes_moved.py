"""Weights cross to the device as they are stored, and once in a pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.data.batches import Batch
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.device import moved
from eigenslice.slicing import slice_model
from eigenslice.stream.walk import Site, Stream
from tests import tiny
from tests.fake_device import fake_device

BLOCKS, MOST = 6, 2.2
CONFIG: dict[str, Any] = tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": BLOCKS}
RUNS: dict[str, dict[str, Any]] = {
    "fitted": {"width": 48, "neurons": 144},
    "not fitted": {"width": 48, "refit": False},
    "per block": {"width": 48, "basis": "per-block"},
    "planned": {"keep": 0.7},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, most of it blocks."""
    return tiny.save(tiny.tiny_model("llama", CONFIG, torch.bfloat16), tmp_path_factory.mktemp("dense"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of passes of the dense model, and of blocks that were read."""
    counts, walk, read = [0, 0], Stream.walk, DenseModel.read_block

    def counted_walk(stream: Stream, batches: list[Batch], *args: Any, **options: Any) -> Iterator[Site]:
        counts[0] += 1
        return walk(stream, batches, *args, **options)

    def counted_read(model: DenseModel, index: int) -> dict[str, torch.Tensor]:
        counts[1] += 1
        return read(model, index)

    monkeypatch.setattr(Stream, "walk", counted_walk)
    monkeypatch.setattr(DenseModel, "read_block", counted_read)
    return counts


@pytest.mark.parametrize("run", RUNS)
def test_weights_cross_once_in_a_pass(run: str, dense: Path, passes: list[int], tmp_path: Path) -> None:
    """In bytes for each parameter of two bytes: so often are blocks read, and the vocabulary's matrices among them."""
    data = CalibrationOptions(data=str(tiny.calibration_file(tmp_path)))
    with fake_device() as gpu:
        options = SliceOptions(model=str(dense), output=tmp_path / "out", calibration=data, device="cuda", **RUNS[run])
        parameters = slice_model(options).manifest["parameters"]["dense"]
    walks, reads = passes
    assert reads == BLOCKS * (walks + (run == "not fitted"))  # without a fit, the last step runs nothing
    assert gpu.to_device <= MOST * parameters * reads / BLOCKS


@pytest.mark.parametrize(
    ("stored", "used", "bytes_of_each"),
    [
        (torch.bfloat16, torch.float64, 2),
        (torch.float32, torch.bfloat16, 2),
        (torch.float16, torch.bfloat16, 2),
        (torch.float32, torch.float32, 4),
    ],
)
def test_the_narrower_dtype_crosses(stored: torch.dtype, used: torch.dtype, bytes_of_each: int) -> None:
    numbers = torch.linspace(-3, 3, 7).to(stored)
    with fake_device() as gpu:
        there = moved(numbers, gpu.device, used)
        assert gpu.to_device == 7 * bytes_of_each
        assert there.device == gpu.device
        assert torch.equal(there.cpu(), numbers.to(used))
