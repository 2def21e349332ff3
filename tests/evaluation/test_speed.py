"""What is timed is a greedy generation, and costs are what formulas say; times themselves aren't tested."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.errors import CheckpointError, OptionsError
from eigenslice.evaluation.costs import peak_memory
from eigenslice.evaluation.speed import Runner, bench
from eigenslice.options.benchmark import BenchOptions
from tests import processes, tiny
from tests.conftest import Slicer
from tests.results import load

Folders = Callable[[str], Path]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", ["llama", "opt", "mistral-window"])
def test_generation_is_transformers_greedy_one(case: str, static: bool, dense_folder: Folders) -> None:
    folder, prompt = dense_folder(case), tiny.random_ids(2, 10)
    options = BenchOptions(prompt=10, new=8, batch=2, static_cache=static, device="cpu")
    found = Runner(str(folder), options).generate(prompt)
    model = load(folder)
    mask = torch.ones_like(prompt)
    expected = model.generate(
        prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tokens.tolist() == expected[:, 10:].tolist()
    assert found.first > 0
    assert found.rest > 0


def llama_costs(width: int, neurons: int, prompt: int, batch: int) -> int:
    """Operations of a prompt in the tiny Llama: 3 blocks, 4 heads of 8, 2 key-value heads; one row of logits."""
    matrices = 3 * (width * (32 + 16 + 16 + 32) + 3 * width * neurons)
    attention = 3 * 2 * 4 * prompt * prompt * 8
    return 2 * batch * (prompt * matrices + attention + width * tiny.VOCABULARY)


@pytest.fixture(scope="module")
def result(dense_folder: Folders, tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> dict[str, Any]:
    """Dense and sliced Llama, timed with a growing cache."""
    from eigenslice.options.calibration_text import CalibrationOptions
    from eigenslice.options.slicing import SliceOptions
    from eigenslice.slicing import slice_model

    output = tmp_path_factory.mktemp("bench") / "sliced"
    data = CalibrationOptions(data=str(calibration))
    slice_model(SliceOptions(model=str(dense_folder("llama")), output=output, width=24, neurons=40, calibration=data))
    options = BenchOptions(prompt=16, new=5, batch=2, runs=3, device="cpu", memory=False)
    return bench([str(dense_folder("llama")), str(output)], options)


def test_costs(result: dict[str, Any]) -> None:
    dense, sliced = result["models"]
    assert dense["operations"] == pytest.approx(llama_costs(32, 56, 16, 2), rel=1e-9)
    assert sliced["operations"] == pytest.approx(llama_costs(24, 40, 16, 2), rel=1e-9)
    cache = 2 * 2 * 3 * (16 + 2.5) * 16 * 4  # keys and values, 2 sequences, 3 blocks, middle length, 2 heads of 8
    for row, width in ((dense, 32), (sliced, 24)):
        read = row["parameters"] - tiny.VOCABULARY * width  # the embedding is only looked up
        assert row["step_bytes"] == int(4 * read + cache)
        assert row["disk_bytes"] == sum(f.stat().st_size for f in Path(row["model"]).glob("*.safetensors"))
        assert row["disk_bytes"] > 4 * row["parameters"]


def test_summaries(result: dict[str, Any]) -> None:
    dense, sliced = result["models"]
    for row in (dense, sliced):
        for name, factor in (("prefill", 2 * 16), ("first_token", None), ("decode", None)):
            spread = row[name]
            assert len(spread["runs"]) == 3
            assert spread["low"] <= spread["median"] <= spread["high"]
            if factor:
                assert spread["median"] * row["first_token"]["median"] == pytest.approx(factor)
    assert "speedup" not in dense
    for phase, cost in (("prefill", "operations"), ("decode", "step_bytes")):
        found = sliced["speedup"][phase]
        rates = zip(sliced[phase]["runs"], dense[phase]["runs"], strict=True)
        assert found["measured"] == pytest.approx(sorted(a / b for a, b in rates)[1])
        assert found["ideal"] == pytest.approx(dense[cost] / sliced[cost])
        assert found["share"] == pytest.approx((found["measured"] - 1) / (found["ideal"] - 1))


def test_a_tied_head_reads_the_embedding(dense_folder: Folders) -> None:
    options = BenchOptions(prompt=4, new=2, runs=1, device="cpu", memory=False, static_cache=True)
    (row,) = bench([str(dense_folder("llama-tied"))], options)["models"]
    cache = 2 * 3 * (4 + 2) * 16 * 4  # a static cache is read at its full length
    assert row["step_bytes"] == 4 * row["parameters"] + cache


def allocate(mebibytes: int) -> None:
    """Use memory, once."""
    assert len(bytearray(mebibytes * 2**20)) > 0


def test_memory_is_that_of_a_fresh_process() -> None:
    """The larger one first: it mustn't count in the other."""
    large, small = (peak_memory(allocate, size) for size in (300, 1))
    assert 280 * 2**20 < large - small < 320 * 2**20


def fail(message: str) -> None:
    """End as a model does that can't be run."""
    raise ValueError(message)


def vanish() -> None:
    """End as a process does that the system kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_fails_while_memory_is_measured(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: processes.CONTEXT)  # it starts sooner
    with pytest.raises(CheckpointError, match=r"failed \(ValueError: too wide\)"):
        peak_memory(fail, "too wide")
    with pytest.raises(CheckpointError, match="memory may have run out"):
        peak_memory(vanish)
    assert "Traceback" not in capfd.readouterr().err


def test_what_can_not_be_timed(dense_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="--new 1"):
        BenchOptions(new=1)
    with pytest.raises(OptionsError, match="takes 64 tokens"):
        bench([str(dense_folder("llama"))], BenchOptions(prompt=60, new=8, device="cpu"))
    with pytest.raises(CheckpointError):
        bench([str(tmp_path)], BenchOptions(device="cpu"))


def test_the_custom_class_is_timed(run_slice: Slicer) -> None:
    output = run_slice("opt", width=24).output
    options = BenchOptions(prompt=8, new=3, runs=1, device="cpu", memory=False)
    (row,) = bench([str(output)], options)["models"]
    assert row["operations"] > 2 * 8 * 3 * (4 * 24 * 32 + 2 * 24 * 56)
