"""Checkpoints are used as they were written, or not at all."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.errors import EigensliceWarning, IncompleteError
from eigenslice.finetune import finetune
from eigenslice.finetune.checkpoints import SEAL, Checkpoints
from eigenslice.runtime.output import partial_path
from tests.attacks.disk import flip, snapshot
from tests.finetune.conftest import Training
from tests.messages import check_message

FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture
def checkpoints(training: Training, tmp_path: Path) -> Checkpoints:
    """Those of an interrupted training, of steps 2, 4 and 6 at most."""
    return Checkpoints(training.interrupt(tmp_path / "out"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_two_are_kept_and_hold_all_that_going_on_needs(checkpoints: Checkpoints) -> None:
    assert names(checkpoints.folder) >= {"checkpoint-4", "checkpoint-6"}
    assert names(checkpoints.path(6)) >= {*FILES, "adapter_model.safetensors", SEAL}
    assert "training_args.bin" not in names(checkpoints.path(6)), "a pickle of any classes"
    before = snapshot(checkpoints.folder)
    seal, changed = checkpoints.usable()
    assert (seal and seal["step"], changed) == (6, "")
    assert snapshot(checkpoints.folder) == before


@pytest.mark.parametrize("how", ["flipped", "missing", "link"])
def test_any_file_that_changed_is_seen(how: str, training: Training, tmp_path: Path) -> None:
    complete = training.interrupt(tmp_path / "complete") / "checkpoint-6"
    for file in sorted(names(complete)):
        if how != "flipped" and file == SEAL:
            continue  # as if it had not been written to its end, or its content is the same
        checkpoints = Checkpoints(training.interrupt(tmp_path / file))
        path = checkpoints.path(6) / file
        if how == "flipped":
            flip(path, 0.6)
        else:
            path.unlink()
        if how == "link":
            path.symlink_to(complete / file)
        seal, changed = checkpoints.usable()
        assert changed == str(path)
        assert seal is not None
        assert seal["step"] == 4
        assert not checkpoints.path(6).exists()


def test_a_file_too_many_is_seen(checkpoints: Checkpoints) -> None:
    (checkpoints.path(6) / "pytorch_model.bin").write_bytes(b"")
    assert checkpoints.usable()[1] == str(checkpoints.path(6) / "pytorch_model.bin")


def test_what_has_no_seal_is_removed_without_a_word(checkpoints: Checkpoints) -> None:
    shutil.copytree(checkpoints.path(6), checkpoints.path(8))
    (checkpoints.path(8) / SEAL).unlink()
    checkpoints.path(9).mkdir()
    seal, changed = checkpoints.usable()
    assert (seal and seal["step"], changed) == (6, "")
    assert not checkpoints.path(8).exists()
    assert not checkpoints.path(9).exists()


def test_a_checkpoint_whose_best_one_changed_is_not_used(tmp_path: Path) -> None:
    """And the best one, when it is old, keeps its weights alone."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3, 4, 5):
        checkpoints.path(step).mkdir()
        for name in ("weights.safetensors", "optimizer.pt"):
            (checkpoints.path(step) / name).write_text(f"{name} {step}")
        checkpoints.seal(step, best=min(step, 2), last=False)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert names(checkpoints.path(2)) == {"weights.safetensors", SEAL}
    assert names(checkpoints.path(4)) == {"weights.safetensors", "optimizer.pt", SEAL}
    checkpoints.check_weights(2)
    seal, _ = checkpoints.usable()
    assert seal is not None
    assert (seal["step"], seal["best"]) == (5, 2)
    flip(checkpoints.path(2) / "weights.safetensors", 0.5)
    with pytest.raises(IncompleteError) as caught:
        checkpoints.check_weights(2)
    check_message(caught.value, "weights.safetensors")
    assert checkpoints.usable() == (None, str(checkpoints.path(2) / "weights.safetensors"))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "damage", ["flip optimizer.pt", "remove optimizer.pt", "flip adapter_model.safetensors", "all"]
)
def test_a_run_with_a_changed_checkpoint_says_so_and_makes_the_same_bytes(
    damage: str, training: Training, tmp_path: Path
) -> None:
    folder = training.interrupt(tmp_path / "out")
    if damage == "all":
        for path in folder.iterdir():
            flip(path / "rng_state.pth" if (path / "rng_state.pth").exists() else path / SEAL, 0.5)
    else:
        how, name = damage.split()
        path = folder / "checkpoint-6" / name
        flip(path, 0.7) if how == "flip" else path.unlink()
    where = "training begins anew" if damage == "all" else "training goes on from step 4"
    with pytest.warns(EigensliceWarning, match=f"is missing or not as it was written: {where}") as warned:
        finetune(training.at(tmp_path / "out"))
    assert len([one for one in warned if issubclass(one.category, EigensliceWarning)]) == 1
    training.check(tmp_path / "out")


class _Runs:
    """A pickle that runs code."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_code_in_a_checkpoint_is_run(name: str, training: Training, tmp_path: Path) -> None:
    """Not even if the seal was made anew by somebody who knows how."""
    folder, ran = training.interrupt(tmp_path / "out"), tmp_path / "ran"
    path = folder / "checkpoint-6" / name
    torch.save(_Runs(ran), path)
    assert pickle.loads(pickle.dumps(_Runs(ran))) is None  # it would run
    ran.unlink()
    (path.parent / SEAL).unlink()
    Checkpoints(folder).seal(6, best=6, last=False)
    with pytest.raises(IncompleteError) as caught:
        finetune(training.at(tmp_path / "out"))
    check_message(caught.value, "no code in it was run")
    assert not ran.exists()
    assert partial_path(tmp_path / "out").exists()
