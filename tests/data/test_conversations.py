"""Conversations in records."""

import json
from pathlib import Path
from typing import Any

import pytest

from eigenslice.data.conversations import chat_renderer, messages_of
from eigenslice.data.texts import load_documents
from tests import words


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "c", "output": "b"}, [("user", "a\n\nc"), ("assistant", "b")]),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
        ({"messages": [{"role": "system", "content": "s"}]}, [("system", "s")]),
        ({"messages": ["a"]}, None),
        ({"instruction": "a", "output": ""}, None),
        ({"text": "a"}, None),
    ],
    ids=str,
)
def test_messages(record: dict[str, Any], expected: list[tuple[str, str]] | None) -> None:
    found = messages_of(record)
    assert (found and [(m["role"], m["content"]) for m in found]) == expected


def test_records_are_rendered_unless_a_field_is_named(tmp_path: Path) -> None:
    tokenizer = words.tokenizer()
    assert chat_renderer(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b", "text": "t"}, {"question": "c", "answer": "d"}]))
    render = chat_renderer(tokenizer)
    chat = load_documents(str(path), None, "calibration", 10, 0, render)
    assert chat.texts == ["<user>a<assistant>b", "<user>c<assistant>d"]
    assert (chat.separator, chat.description) == ("", "records.json, chat template")
    path.write_text(json.dumps([{"instruction": "a", "output": "b", "text": "t"}, {"text": "u"}]))
    named = load_documents(str(path), "text", "calibration", 10, 0, render)
    assert (named.texts, named.separator, named.description) == (["t", "u"], "\n\n", "records.json")
    mixed = load_documents(str(path), None, "calibration", 10, 0, render)
    assert (mixed.texts, mixed.separator) == (["<user>a<assistant>b", "u"], "\n\n")
