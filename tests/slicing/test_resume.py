"""An interrupted run goes on to the result of an uninterrupted one, byte for byte."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenslice.errors import IncompleteError, OptionsError, OutputError
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime import run_state as resume
from eigenslice.runtime.offload import Offload
from eigenslice.runtime.output import partial_path
from eigenslice.runtime.ranks import ALONE
from eigenslice.runtime.run_state import RunState
from eigenslice.slicing import slice_model
from tests import tiny
from tests.conftest import Folders
from tests.messages import check_message

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"width": 24, "refit": False},
    "fitted": {"width": 24, "neurons": 48},
    "planned": {"keep": 0.75},
    "uneven": {"keep": 0.75, "form": "custom"},
    "per-block": {"width": 24, "basis": "per-block"},
    "offloaded": {"keep": 0.3, "heads": False, "offload": "disk", "shard_gib": 2e-5},  # and without a block
}
CASES = {
    "plain": "gpt_neox",
    "fitted": "opt",
    "planned": "llama-tied",
    "uneven": "llama",
    "per-block": "opt",
    "offloaded": "llama-tied",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every block, however long that takes."""
    monkeypatch.setattr(resume, "SHARE", 1.0)


def options_of(kind: str, model: Path, calibration: Path, output: Path, **more: Any) -> SliceOptions:
    data = CalibrationOptions(data=str(calibration))
    return SliceOptions(model=str(model), output=output, calibration=data, **RUNS[kind], **more)


class Stop:
    """Interrupts at the n-th report of progress."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, stage: str, done: int, total: int, tokens: int = 0) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("always_saved")
@pytest.mark.parametrize("kind", RUNS)
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    kind: str, dense_folder: Folders, calibration: Path, tmp_path: Path
) -> None:
    case, counted = CASES[kind], Stop(1 << 30)
    slice_model(options_of(kind, dense_folder(case), calibration, tmp_path / "whole"), counted)
    expected = contents(tmp_path / "whole")
    reports = (1 << 30) - counted.left
    assert reports >= 4
    for at in range(2, reports + 1, max(1, reports // 7)):
        output = tmp_path / f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            slice_model(options_of(kind, dense_folder(case), calibration, output), Stop(at))
        assert not output.exists()
        slice_model(options_of(kind, dense_folder(case), calibration, output, resume=True))
        found = contents(output)
        for name in ("eigenslice.json", "README.md"):  # they tell the output's name, and the command
            found[name] = found[name].replace(output.name.encode(), b"whole").replace(b" --resume", b"")
        found["eigenslice.json"] = found["eigenslice.json"].replace(b'"resume": true', b'"resume": false')
        assert found == expected
        assert not partial_path(output).exists()


@pytest.mark.usefixtures("always_saved")
def test_it_goes_on_where_it_was(dense_folder: Folders, calibration: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    options = options_of("fitted", dense_folder("llama"), calibration, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        slice_model(options, Stop(11))  # measuring passes 7 sites; at the 10th, the second block is begun
    again = options.model_copy(update={"resume": True})
    slice_model(again, lambda stage, done, total, tokens=0: seen.append((stage, done)))
    assert seen[0][0] == "slicing"
    assert seen[0][1] > 0


def test_a_changed_input_or_option_is_refused_with_the_difference(
    dense_folder: Folders, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save(tiny.CASES["llama"].build(), tmp_path / "model")
    own = tmp_path / "ids.safetensors"
    own.write_bytes(calibration.read_bytes())
    options = options_of("fitted", model, own, tmp_path / "out", resume=True)
    with pytest.raises(KeyboardInterrupt):
        slice_model(options, Stop(11))
    assert partial_path(tmp_path / "out").exists()

    def refused(**changed: Any) -> OptionsError:
        with pytest.raises(OptionsError) as caught:
            slice_model(options.model_copy(update=changed))
        return caught.value

    check_message(refused(neurons=40), "option neurons was 48, is 40")
    check_message(refused(multiple=16), "option multiple was 8, is 16")
    with pytest.raises(OutputError) as caught:
        slice_model(options.model_copy(update={"resume": False}))
    check_message(caught.value, "holds an interrupted run")
    ids = load_file(own)["calibration"]
    save_file({"calibration": ids.flip(0)}, own)
    check_message(refused(), "calibration tokens was")
    save_file({"calibration": ids}, own)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_message(refused(), "input model.safetensors was")
    tensors["model.norm.weight"][0] -= 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with monkeypatch.context() as patched:
        patched.setattr("eigenslice.report.manifest.__version__", "99")
        check_message(refused(), "version was", "is 99")


def test_a_complete_result_is_complete(dense_folder: Folders, calibration: Path, tmp_path: Path) -> None:
    """Killed after its last step, a run that is resumed has nothing to do; another run has no right to the name."""
    options = options_of("plain", dense_folder("llama"), calibration, tmp_path / "out")
    whole = slice_model(options)
    before = contents(tmp_path / "out")
    assert slice_model(options.model_copy(update={"resume": True})).manifest == whole.manifest
    with pytest.raises(OptionsError) as caught:
        slice_model(options.model_copy(update={"resume": True, "width": 20, "dtype": "bfloat16"}))
    check_message(caught.value, "is complete", "option dtype was None, is bfloat16; option width was 24, is 20")
    assert contents(tmp_path / "out") == before


def test_a_disk_that_fills_up_stops_it_and_it_goes_on(
    dense_folder: Folders, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SHARE", 1.0)
    slice_model(options_of("fitted", dense_folder("llama"), calibration, tmp_path / "whole"))
    output, write, calls = tmp_path / "out", os.pwrite, [0]

    def full(descriptor: int, data: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] == 25:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(IncompleteError) as caught:
            slice_model(options_of("fitted", dense_folder("llama"), calibration, output))
    check_message(caught.value, "No space left on device")
    assert "--resume" in caught.value.next_step
    slice_model(options_of("fitted", dense_folder("llama"), calibration, output, resume=True))
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_state_is_current_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SHARE", 1.0)
    streams = Offload("device", torch.device("cpu")).tensors()
    streams.append(torch.ones(2, 3))
    state = RunState(tmp_path, ALONE)
    state.save("measuring", 3, {"dense": streams}, {"sum": torch.full((2,), 3.0)}, lambda: {"note": 3})
    streams[0] = torch.zeros(2, 3)
    with monkeypatch.context() as patched:
        patched.setattr(RunState, "_commit", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            state.save("measuring", 4, {"dense": streams}, {"sum": torch.full((2,), 4.0)}, lambda: {"note": 4})
    position = RunState(tmp_path, ALONE).position("measuring")
    assert position is not None
    assert (position.block, position.content) == (3, {"note": 3})
    assert torch.equal(position.tensors["sum"], torch.full((2,), 3.0))
    restored = Offload("device", torch.device("cpu")).tensors()
    position.restore("dense", restored)
    assert torch.equal(restored[0], torch.ones(2, 3))
    again = RunState(tmp_path, ALONE)
    again.save("measuring", 4, {"dense": streams}, {}, dict)
    position = RunState(tmp_path, ALONE).position("measuring")
    assert position is not None
    assert position.block == 4
    again.finish("measuring", {"moment": torch.eye(2)}, {"kl": [0.1]})
    later = RunState(tmp_path, ALONE)
    assert later.position("measuring") is None
    result = later.result("measuring")
    assert result is not None
    assert torch.equal(result[0]["moment"], torch.eye(2))
    assert result[1] == {"kl": [0.1]}
    assert later.result("planning") is None
