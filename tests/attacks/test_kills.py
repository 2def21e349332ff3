"""Every verb that writes, killed at random moments: nothing else on the disk changes, and the work is not lost.

The real thing: SIGKILL, in a process of its own, at random moments of the time that the verb takes.
"""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from eigenslice.runtime.output import partial_path
from tests import processes, tiny, words
from tests.attacks.disk import snapshot
from tests.checkpoint.files import copy_of
from tests.conftest import Folders
from tests.export import models

KILLS = 3


@dataclass(frozen=True)
class Verb:
    """A verb that writes.

    Attributes:
        output: Name of what it writes.
        arguments: From the folder with `dense`, `bytes`, `sliced` and `text.txt` to its arguments.
        again: What is added to go on.
        same: Names in the output that are the same bytes each time; none for a file that is.
    """

    output: str
    arguments: Callable[[Path], list[object]]
    again: tuple[str, ...] = ()
    same: tuple[str, ...] = ()


def sliced(folder: Path) -> list[object]:
    return ["slice", folder / "dense", "--keep", "0.75", "--calibration", folder / "text.txt", "--samples", "24"]


VERBS = {
    "slice": Verb("out", sliced, ("--resume",), ("model.safetensors", "config.json")),
    "finetune": Verb(
        "out",
        lambda folder: [
            *["finetune", folder / "sliced", "--teacher", folder / "dense", "--calibration", folder / "text.txt"],
            *["--samples", "16", "--held-out", "4", "--seqlen", "16", "--epochs", "3", "--batch", "4"],
        ],
        ("--resume",),
        ("model.safetensors", "config.json"),
    ),
    "export": Verb("out.gguf", lambda folder: ["export", folder / "bytes", "--to", "gguf", "--type", "f32"]),
    "sample": Verb("out.json", lambda folder: ["sample", folder / "dense", "--samples", "8", "--seqlen", "32"]),
    "report": Verb("out.html", lambda folder: ["report", folder / "sliced"]),
}


@pytest.fixture(scope="module")
def inputs(dense_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two dense models (of words and of bytes), a sliced one and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    models.save(folder / "bytes")
    copy_of(dense_folder("llama"), folder / "dense")
    words.tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(words.text(tiny.random_ids(1, 800)[0].tolist()))
    run(sliced(folder), folder / "sliced", folder / "log")
    (folder / "log").unlink()
    return folder


def run(arguments: list[object], output: Path, log: Path) -> float:
    """Run a verb to its end; the seconds that it took."""
    begun = time.monotonic()
    process = processes.command(*arguments, "-o", output, log=log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    return time.monotonic() - begun


def content(output: Path, names: tuple[str, ...]) -> list[bytes]:
    return [(output / name).read_bytes() for name in names] if names else [output.read_bytes()]


@pytest.mark.parametrize("name", VERBS)
def test_killed_at_any_moment_nothing_is_lost(name: str, inputs: Path, tmp_path: Path) -> None:
    verb = VERBS[name]
    world = tmp_path / "world"
    shutil.copytree(inputs, world)
    (world / "notes.txt").write_text("mine")
    arguments, output, log = verb.arguments(world), world / verb.output, tmp_path / "log"
    run(arguments, output, log)  # it may wait for the imports
    _remove(output)
    before = snapshot(world)
    seconds = run(arguments, output, log)
    expected = content(output, verb.same)
    moments = random.Random(0)
    for _ in range(KILLS):
        _remove(output)
        assert snapshot(world) == before
        process = processes.command(*arguments, "-o", output, log=log)
        time.sleep(seconds * moments.uniform(0.1, 1.0))
        process.kill()
        process.join()
        hidden = f".{verb.output}.eigenslice-new"
        assert snapshot(world, [output.name, partial_path(output).name, hidden]) == before
        only_the_folder_is_left = output.exists() and not verb.again  # killed behind the rename; it holds nothing
        if not output.exists():
            run([*arguments, *verb.again], output, log)
        elif verb.again:
            run([*arguments, *verb.again], output, log)  # complete: there is nothing to do
        assert content(output, verb.same) == expected
        assert only_the_folder_is_left or not partial_path(output).exists()
        assert not (world / hidden).exists()


def _remove(output: Path) -> None:
    shutil.rmtree(partial_path(output), ignore_errors=True)
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
