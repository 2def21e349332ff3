"""Files of the user's through the verbs that read them."""

import gzip
import json
import os
from pathlib import Path

import pytest

from tests import words
from tests.cli.conftest import Command, Failure
from tests.tiny import random_ids

TEMPLATE = "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"


def turns(seed: int) -> dict[str, object]:
    """A conversation of 40 words."""
    ids = random_ids(1, 40, seed=seed)[0].tolist()
    asked, answered = words.text(ids[:10]), words.text(ids[10:])
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A packed file of conversations, two of which can't be used."""
    records = [turns(seed) for seed in range(12)]
    records[3] = {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": ""}]}
    records[7] = {"messages": None}
    path = tmp_path / "talk.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


@pytest.fixture
def chat_model(model: Path) -> Path:
    tokenizer = words.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return model


def test_conversations_are_read_by_slice_and_eval(
    chat_model: Path, conversations: Path, command: Command, tmp_path: Path
) -> None:
    data = ("--samples", 4, "--seqlen", 32)
    sliced = command("slice", chat_model, "-o", tmp_path / "out", "--width", 24, "--calibration", conversations, *data)
    assert sliced.code == 0, sliced.err
    assert "2 of 12 records can't be used and are left out. The first: line 4 has an empty answer" in sliced.err
    manifest = json.loads((tmp_path / "out" / "eigenslice.json").read_text())
    assert manifest["calibration"]["data"] == "talk.jsonl.gz, chat template"
    measured = command("eval", chat_model, "--data", conversations, *data, "--json")
    assert measured.json[0]["data"]["data"] == "talk.jsonl.gz, chat template"
    assert measured.json[0]["tokens"] == 4 * 31


def test_a_template_that_refuses_all_is_one_message(chat_model: Path, conversations: Path, fails: Failure) -> None:
    tokenizer = words.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only in threes') }}"
    tokenizer.save_pretrained(chat_model)
    message = fails("eval", chat_model, "--data", conversations, "--quiet")
    assert "only in threes" in message
    assert "none of 12 records" in message


@pytest.mark.parametrize("verb", ["slice", "eval"])
def test_files_that_are_no_text_are_one_message(verb: str, model: Path, fails: Failure, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "a.txt").write_bytes(b"PK\x03\x04 a zip")
    for name, found in (("none.jsonl", "doesn't exist"), ("pipe.safetensors", "is a pipe"), ("a.txt", "a zip archive")):
        data = tmp_path / name
        arguments = (
            ["-o", tmp_path / "out", "--width", 24, "--calibration", data] if verb == "slice" else ["--data", data]
        )
        assert found in fails(verb, model, *arguments, "--quiet")
