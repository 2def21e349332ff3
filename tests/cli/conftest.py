"""Running the command line in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eigenslice.cli import main
from tests import tiny, words
from tests.checkpoint.files import copy_of


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]
Failure = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `eigenslice` with these arguments; an exception that it doesn't catch fails the test."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["eigenslice", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capfd.readouterr()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), printed.out, printed.err)

    return run


@pytest.fixture
def fails(command: Command) -> Failure:
    """Runs a command that has to end in eigenslice's own error; gives the message."""

    def run(*arguments: object) -> str:
        outcome = command(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        assert "bug in eigenslice" not in outcome.err
        start = outcome.err.rindex("error: ")
        message = outcome.err[start:].rstrip("\n").split("\n")
        assert len(message) == 3, message
        assert message[1].startswith("  allowed: ")
        assert message[2].startswith("  next:    ")
        return message[0]

    return run


@pytest.fixture
def model(dense_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer, to use or to break."""
    folder = copy_of(dense_folder("llama"), tmp_path / "model")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of the tokenizer's words."""
    path = tmp_path / "text.txt"
    path.write_text(words.text(tiny.random_ids(1, 400)[0].tolist()))
    return path
