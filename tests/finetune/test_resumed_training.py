"""Whatever ends a training, and whenever: it goes on to the same bytes, and says what to do."""

import errno
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer

from eigenslice.errors import IncompleteError, OptionsError, OutputError
from eigenslice.finetune import FinetuneOptions, checkpoints, finetune, recovery, result
from eigenslice.finetune.checkpoints import Checkpoints
from eigenslice.runtime import work_folder as workfolder
from eigenslice.runtime.output import partial_path
from tests import processes
from tests.attacks.disk import snapshot
from tests.conftest import Folders
from tests.finetune.conftest import Training, contents, interrupt_at, make_training
from tests.messages import check_message

FULL = OSError(errno.ENOSPC, "No space left on device")
UNWRITTEN = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
PLACES: dict[str, tuple[Any, str, int, BaseException]] = {
    "a checkpoint's weights": (Trainer, "save_model", 1, UNWRITTEN),
    "a checkpoint's optimizer": (Trainer, "_save_optimizer_and_scheduler", 1, KeyboardInterrupt()),
    "a checkpoint on the disk": (checkpoints, "flush_all", 1, FULL),
    "a seal": (checkpoints, "replace_json", 1, KeyboardInterrupt()),
    "an old checkpoint": (Checkpoints, "_thin", 1, FULL),
    "the result's folder": (result.WorkFolder, "result", 2, KeyboardInterrupt()),
    "the result's weights": (PreTrainedModel, "save_pretrained", 2, UNWRITTEN),
    "its hashes": (result, "file_hashes", 1, KeyboardInterrupt()),
    "its manifest": (result, "write_json", 1, FULL),
    "its card": (recovery, "write_card", 1, KeyboardInterrupt()),
    "its way to the disk": (workfolder, "flush_all", 1, FULL),
}
"""Where a run may end: in which call of what, and why."""


def failing(call: Any, number: int, error: BaseException) -> Any:
    """A function, or a property, that raises at its n-th call."""
    count = 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise error
        function: Any = call.fget if isinstance(call, property) else call
        return function(*args, **kwargs)

    return property(run) if isinstance(call, property) else run


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    place: str, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, or by a full disk as each library tells of it."""
    owner, name, number, error = PLACES[place]
    training.interrupt(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), number, error))
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else IncompleteError) as caught:
            finetune(training.at(tmp_path / "out"))
    if isinstance(caught.value, IncompleteError):
        check_message(caught.value, str(tmp_path / "out"))
        assert "--resume" in caught.value.next_step
    assert not (tmp_path / "out").exists()
    finetune(training.at(tmp_path / "out"))
    training.check(tmp_path / "out")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file become larger: the nearest thing to a full disk that needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "the result"])
def test_where_a_file_can_not_be_written_the_work_before_is_kept(what: str, training: Training, tmp_path: Path) -> None:
    """The system itself refuses to write, in Python, safetensors and torch."""
    folder = training.interrupt(tmp_path / "out")
    path = folder / "checkpoint-6" / what
    size = len(training.expected["model.safetensors"]) if what == "the result" else path.stat().st_size
    before = {p.name for p in folder.iterdir()}
    with largest_file(size - 1), pytest.raises(IncompleteError) as caught:
        finetune(training.at(tmp_path / "out"))
    check_message(caught.value, f"writing {tmp_path / 'out'} failed")
    assert "--resume" in caught.value.next_step
    if what != "the result":
        assert {p.name for p in folder.iterdir()} == before
    finetune(training.at(tmp_path / "out"))
    training.check(tmp_path / "out")


def test_a_full_disk_before_there_is_anything_to_keep_leaves_nothing(training: Training, tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(OutputError) as caught:
        finetune(training.at(tmp_path / "out", resume=False))
    check_message(caught.value, str(tmp_path / "out"))
    assert not partial_path(tmp_path / "out").exists()


def run(options: str) -> None:
    """Runs in a process of its own."""
    finetune(FinetuneOptions.model_validate_json(options))


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(training: Training, tmp_path: Path) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = run, training.at(output).model_dump_json()
    process = processes.call(*arguments, log=log)  # it may wait for the imports
    process.join(120)
    training.check(output)
    begun = time.monotonic()
    process = processes.call(run, training.at(tmp_path / "timed").model_dump_json(), log=log)
    process.join(120)
    seconds = time.monotonic() - begun
    before = snapshot(training.interrupted.parent)
    moments = random.Random(0)
    for path in output.iterdir():
        path.unlink()
    output.rmdir()
    for _ in range(3):
        process = processes.call(*arguments, log=log)
        time.sleep(seconds * moments.uniform(0.2, 1.0))
        process.kill()
        process.join()
        assert snapshot(training.interrupted.parent) == before
    process = processes.call(*arguments, log=log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    training.check(output)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "timed", "log"}


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_all_weights_go_on_too(case: str, dense_folder: Folders, calibration: Path, tmp_path: Path) -> None:
    """In a folder of another name; a mixture's experts are stored in other parts than the model has."""
    (tmp_path / "full").mkdir()
    training = make_training(dense_folder, calibration, tmp_path / "full", case, full=True, dropout=0.0)
    training.interrupt(tmp_path / "out")
    finetune(training.at(tmp_path / "out"))
    training.check(tmp_path / "out")
    if case == "llama":  # in files of another size: only the last step cuts them
        training.interrupt(tmp_path / "cut")
        finetune(training.at(tmp_path / "cut", shard_gib=1e-5))
        assert "model.safetensors.index.json" in contents(tmp_path / "cut")


@pytest.mark.filterwarnings("ignore:Training didn't help")
@pytest.mark.parametrize(
    "changed",
    [{"patience": 1, "learning_rate": 0.5, "evaluate_every": 1}, {"epochs": 1.5}, {"epochs": 0.01}],
    ids=["stopped-early", "part-of-an-epoch", "one-step"],
)
def test_a_training_that_had_ended_trains_no_more(changed: dict[str, Any], training: Training, tmp_path: Path) -> None:
    outputs = tmp_path / "undisturbed", tmp_path / "interrupted"
    finetune(training.at(outputs[0], resume=False, **changed))
    options = training.at(outputs[1], **changed)
    with pytest.raises(KeyboardInterrupt):
        finetune(options.model_copy(update={"resume": False}), interrupt_at("after", 0))
    stages = []
    found = finetune(options, lambda stage, done, total: stages.append(stage))
    assert set(stages) == {"before", "after"}
    assert contents(outputs[1])["model.safetensors"] == contents(outputs[0])["model.safetensors"]
    assert found.manifest["finetune"]["loss"]
    assert not partial_path(outputs[1]).exists()


def test_what_is_complete_is_given_again(training: Training, tmp_path: Path) -> None:
    output = training.options.output
    before = snapshot(output)
    partial_path(output).mkdir()
    (partial_path(output) / "lock").touch()  # a run that was killed right after its last step
    stages = []
    found = finetune(training.at(output), lambda stage, done, total: stages.append(stage))
    assert found.manifest["finetune"]["perplexity"]["after"] == found.after.perplexity
    assert found.after.perplexity == pytest.approx(2.718281828459045**found.after.loss)
    assert stages == []
    assert snapshot(output) == before
    assert not partial_path(output).exists()
    for changed in ({"learning_rate": 2e-2}, {"keep_adapter": True}, {"shard_gib": 1e-5}):
        with pytest.raises(OptionsError) as caught:
            finetune(training.at(output, **changed))
        check_message(caught.value, f"finetune {next(iter(changed))} was")
    with pytest.raises(OutputError) as refused:
        finetune(training.at(output, resume=False))
    check_message(refused.value, "exists already")
    assert snapshot(output) == before


@pytest.mark.parametrize("changed", [{"learning_rate": 2e-2}, {"full": True}, {"teacher": "dense"}], ids=str)
def test_it_goes_on_only_as_it_was_begun(
    changed: dict[str, Any], training: Training, dense_folder: Folders, tmp_path: Path
) -> None:
    training.interrupt(tmp_path / "out")
    before = snapshot(partial_path(tmp_path / "out"))
    if "teacher" in changed:
        changed = {"teacher": str(dense_folder("llama"))}
    with pytest.raises(OptionsError) as caught:
        finetune(training.at(tmp_path / "out", **changed))
    check_message(caught.value, f"finetune {next(iter(changed))} was")
    assert snapshot(partial_path(tmp_path / "out")) == before
