"""The same hostile folder or file through every verb: one message, nothing run, nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import slice_model
from tests import tiny, words
from tests.attacks import hostile
from tests.checkpoint.files import copy_of
from tests.checkpoint.gguf_file import write_gguf
from tests.cli.conftest import Failure, command, fails, model, text
from tests.conftest import Folders

__all__ = ["command", "fails", "model", "text"]
FOLDERS = [
    "pipe-config",
    "zero-weights",
    "linked-tokens-map",
    "deep-config",
    "layers",
    "no-heads",
    "positions",
    "pickles-bin",
    "pickles-half",
    "outside",
    "index-and-single",
    "adapter-alone",
    "header-overlap",
    "unknown-tensor",
]
GGUFS = ["fewer-blocks-said", "array-2^31", "offset-overlaps", "neurons-2^31"]


Verbs = dict[str, Callable[[Path], list[object]]]


@pytest.fixture(scope="module")
def sliced(dense_folder: Folders, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result, with the tokenizer of the dense model."""
    folder = tmp_path_factory.mktemp("hostile")
    source = copy_of(dense_folder("llama"), folder / "dense")
    words.tokenizer().save_pretrained(source)
    data = CalibrationOptions(data=str(calibration))
    return slice_model(SliceOptions(model=str(source), output=folder / "sliced", width=24, calibration=data)).output


@pytest.fixture
def verbs(sliced: Path, calibration: Path, text: Path, tmp_path: Path) -> Verbs:
    """The arguments with which each verb reads a model."""
    out = tmp_path / "new"
    training = ["-o", out, "--calibration", text, "--samples", 2, "--seqlen", 8, "--held-out", 1]
    return {
        "slice": lambda name: ["slice", name, "-o", out, "--width", 24, "--calibration", calibration],
        "inspect": lambda name: ["inspect", name],
        "eval": lambda name: ["eval", name, "--data", calibration],
        "sample": lambda name: ["sample", name, "-o", out.with_suffix(".json")],
        "bench": lambda name: ["bench", name, "--prompt", 4, "--new", 2, "--runs", 1],
        "export": lambda name: ["export", name, "--to", "gguf", "-o", out.with_suffix(".gguf"), "--no-check"],
        "finetune": lambda name: ["finetune", name, *training],
        "teacher": lambda name: ["finetune", sliced, "--teacher", name, *training],
        "report": lambda name: ["report", sliced, "-o", out.with_suffix(".html"), "--generate", name],
    }


def refused(fails: Failure, verbs: Verbs, name: Path, place: Path) -> None:
    """Every verb says of the model that it can't be taken, and writes nothing."""
    before = set(place.rglob("*"))
    for verb, arguments in verbs.items():
        assert name.name in fails(*arguments(name)), verb
        assert set(place.rglob("*")) == before, verb
    assert not (place / hostile.BOOM).exists(), "code was run"


@pytest.mark.parametrize("attack", FOLDERS)
def test_folders(attack: str, fails: Failure, verbs: Verbs, model: Path, tmp_path: Path) -> None:
    hostile.FOLDERS[attack](model)
    refused(fails, verbs, model, tmp_path)


@pytest.mark.parametrize("attack", GGUFS)
def test_ggufs(attack: str, fails: Failure, verbs: Verbs, tmp_path: Path) -> None:
    path = write_gguf(tiny.CASES["llama"].build(), tmp_path / "tiny.gguf")
    path.write_bytes(hostile.GGUFS[attack](path.read_bytes()))
    refused(fails, verbs, path, tmp_path)
