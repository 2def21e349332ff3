"""Memory doesn't grow with the number of blocks, whatever their size."""

import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from eigenslice import CalibrationOptions, SliceOptions, slice_model
from eigenslice.runtime.progress import MIB
from tests import processes, tiny

WIDTH, BLOCKS, SOME = 384, 16, 5
CONFIG: dict[str, Any] = tiny.LLAMA | {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": BLOCKS}
PLANS = {
    "no-refit": {"width": 288, "refit": False},
    "per-block": {"width": 288, "basis": "per-block"},
    "refit": {"width": 288, "neurons": 288},
}
OF_NO_BLOCKS = {"head", "predicting", "checking"}
"""Stages behind the last block, whose steps are batches or MiB."""
PEAK, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak() -> int:
    """Largest resident memory of this process since it was last asked for, in bytes (man 5 proc)."""
    found = next(line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM:"))
    RESET.write_text("5")
    return int(found.split()[1]) * 1024


def slice_and_watch(options: str, result: str) -> None:
    """Write the peak of each block, by the name of the stage, as JSON."""
    peaks: dict[str, list[int]] = {}

    def watch(stage: str, done: int, total: int, tokens: int = 0) -> None:
        of_blocks = peaks.setdefault(stage, [0] * (total + 1))
        of_blocks[done] = max(of_blocks[done], peak())

    slice_model(SliceOptions.model_validate_json(options), watch)
    Path(result).write_text(json.dumps(peaks))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many blocks."""
    return tiny.save(tiny.tiny_model("llama", CONFIG), tmp_path_factory.mktemp("dense"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not RESET.exists(), reason="Linux's peaks, glibc's allocator")
@pytest.mark.parametrize("plan", PLANS)
def test_last_blocks_take_no_more_memory_than_the_first(plan: str, dense: Path, tmp_path: Path) -> None:
    """By less than three, 10 MiB; left alone, glibc keeps 14 MiB and more of the blocks in between."""
    data = CalibrationOptions(data=str(tiny.calibration_file(tmp_path, 8, 64)))
    options = SliceOptions(model=str(dense), output=tmp_path / "out", calibration=data, **PLANS[plan])
    log, result = tmp_path / "log", tmp_path / "peaks.json"
    process = processes.call(slice_and_watch, options.model_dump_json(), str(result), log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    block = 4 * 6 * WIDTH**2  # half as many key/value heads as heads, and an MLP as wide as the stream
    stages = json.loads(result.read_text())
    for stage in stages.keys() - OF_NO_BLOCKS:
        peaks = stages[stage]
        assert len(peaks) == BLOCKS + 1
        grown = median(peaks[-SOME:]) - median(peaks[1 : SOME + 1])  # the first one has the embeddings, too
        assert grown < 3 * block, (stage, [round(peak / MIB) for peak in peaks])
