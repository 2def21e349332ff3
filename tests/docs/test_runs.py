"""The commands of the README and the tutorial, run in their order on a tiny model."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Command as Cli
from tests.cli.conftest import command as command
from tests.docs.markdown import ROOT, Command, commands, fences
from tests.export import models

TEXT = [f"the tin in the hat {i} is thin 12 " * 3 for i in range(60)]
LESS = {
    "slice": ["--samples", "12", "--seqlen", "16"],
    "eval": ["--samples", "4", "--seqlen", "16", "--prompts", "2", "--new", "2"],
    "sample": ["--samples", "4", "--seqlen", "16"],
    "finetune": ["--samples", "12", "--seqlen", "16", "--held-out", "4"],
    "bench": ["--prompt", "8", "--new", "2", "--runs", "1", "--no-memory"],
    "report": ["--new", "2"],
}
"""Options behind those of the documents, so that a run takes less time; the last value counts."""
DEFAULT = {"slice": "--calibration", "finetune": "--calibration", "eval": "--data"}
TEXTS = ("--calibration", "--data", "--vocabulary-from")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the model of the documents, in which commands run."""
    models.save(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapted(words: tuple[str, ...]) -> list[str]:
    """A command of the documents with the tiny model for each dense one, texts that are files, and less of all."""
    verb, *rest = words
    verb_words = [verb, *_arguments(rest), *LESS.get(verb, [])]
    if "--heal" in rest:
        verb_words += ["--heal", "400"]
    if verb in DEFAULT and DEFAULT[verb] not in rest and "--generate" not in rest:
        verb_words += [DEFAULT[verb], _text("default")]
    return verb_words


def _arguments(words: list[str]) -> Iterator[str]:
    before = ""
    for word in words:
        dense = re.fullmatch(r"models/.*\.gguf|[A-Z]\w+/[\w.-]+", word)
        yield _text(word) if before in TEXTS else "MODEL" if dense else word
        before = word


def _text(source: str) -> str:
    """A file in the place of a text, its name the same for the same text."""
    path = Path(source if source.endswith((".json", ".txt")) else f"{source}.json")
    if not path.exists():
        path.write_text(json.dumps(TEXT) if path.suffix == ".json" else "\n".join(TEXT), encoding="utf-8")
    return str(path)


def run(shown: Command, command: Cli) -> None:
    """Run a command where the one before has left its files."""
    words = adapted(shown.eigenslice or ())
    if "-o" in words and "--resume" not in words:
        shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
    outcome = command(*words)
    assert outcome.code == 0, (str(shown), words, outcome.err)
    assert outcome.out or outcome.err
    if shown.to:
        Path(shown.to).write_text(outcome.out, encoding="utf-8")


def runs(page: Path) -> list[Command]:
    """What runs here: without tasks of lm-eval, which tests/cli has, and whose import alone takes seconds."""
    shown = [c for c in dict.fromkeys(commands(page)) if c.eigenslice]
    return [_without_tasks(c) for c in shown if "--tasks" not in c.words or c.words[1] == "report"]


def _without_tasks(shown: Command) -> Command:
    words = list(shown.words)
    if "--tasks" in words:
        at = words.index("--tasks")
        del words[at : at + 2]
    return Command(shown.page, tuple(words), shown.to)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_commands_run_in_their_order(page: str, command: Cli, place: Path) -> None:
    shown = runs(ROOT / page)
    assert len(shown) > 7
    for each in shown:
        run(each, command)
    snippets = [text for text in fences(ROOT / page, "python") if "PeftModel" not in text]
    assert snippets
    for snippet in snippets:
        scope: dict[str, object] = {}
        exec(compile(snippet, page, "exec"), scope)
        assert type(scope["model"]).__name__ == "LlamaForCausalLM"
