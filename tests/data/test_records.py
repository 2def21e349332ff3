"""From records to texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from eigenslice.data.conversations import Conversation
from eigenslice.data.texts import Chat, Documents, load_documents
from eigenslice.data.unusable import UnusableError
from eigenslice.errors import CalibrationError
from tests.messages import check_message

QUESTION = {"instruction": "a", "output": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def tagged(conversation: Conversation) -> str:
    """Stands in for a chat template, which refuses the word "no"."""
    if any(m["content"] == "no" for m in conversation.messages):
        raise UnusableError("is refused by the chat template (no)", "repair the template")
    return "".join(f"<{m['role']}>{m['content']}" for m in conversation.messages)


TEMPLATE = Chat(tagged, template=True)
FIRST = Chat(tagged, template=True, first=True)


def read(folder: Path, records: list[Any], field: str | None = None, chat: Chat | None = None) -> Documents:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_documents(str(path), field, "calibration", 1000, 0, chat)


def refused(folder: Path, records: list[Any], field: str | None = None, chat: Chat | None = None) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        read(folder, records, field, chat)
    return caught.value


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (3, "is a number"),
        (None, "is null"),
        (["x"], "is a list"),
        ({}, "has no text in field text (there is none); it has []"),
        ({"text": None, "n": 1}, "has no text in field text (null); it has ['text', 'n']"),
        ({"text": 5}, "has no text in field text (a number); it has ['text']"),
        ({"text": " "}, "has an empty text; it has ['text']"),
        ({"text": []}, "has no text in field text (a list); it has ['text']"),
        ({"body": "x"}, "has no text in field text (there is none); it has ['body']"),
        (
            {"instruction": "a", "input": "", "output": ""},
            "has no text in output (empty); it has ['instruction', 'input'",
        ),
        ({"messages": []}, "has no messages in messages; it has ['messages']"),
        ({"instruction": "no", "output": "b"}, "is refused by the chat template (no)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chat", [TEMPLATE, FIRST], ids=["template", "first"])
def test_records_that_can_not_be_used_are_counted_and_the_first_is_named(
    record: Any, why: str, chat: Chat, tmp_path: Path
) -> None:
    result = read(tmp_path, ["one", record, QUESTION, record], chat=chat)
    assert result.texts == ["one", "<user>a<assistant>b"]
    (note,) = result.notes
    assert "records.jsonl: 2 of 4 records can't be used and are left out. The first: line 2 " in note
    assert why in note


def test_records_of_which_none_can_be_used_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, [{"body": "x"}, 3])
    check_message(error, "none of 2 records can be used", "line 1 has no text in field text", "it has ['body']")
    assert "--field" in error.next_step
    error = refused(tmp_path, [{"prompt": "no", "completion": "b"}], chat=TEMPLATE)
    check_message(error, "its only record", "is refused by the chat template (no)")
    assert error.next_step == "repair the template"


def test_blank_texts_are_no_text(tmp_path: Path) -> None:
    check_message(refused(tmp_path, [{"text": ""}, {"text": " "}]), "holds no text", "line 1 has an empty text")


def test_a_text_of_its_own_comes_before_a_conversation_unless_that_is_asked_for(tmp_path: Path) -> None:
    both = QUESTION | {"text": "t"}
    assert read(tmp_path, [both], chat=TEMPLATE).texts == ["t"]
    assert read(tmp_path, [both], chat=FIRST).texts == ["<user>a<assistant>b"]
    assert read(tmp_path, [QUESTION | {"text": ""}], chat=TEMPLATE).texts == ["<user>a<assistant>b"]


def test_conversations_in_a_template_are_joined_by_nothing(tmp_path: Path) -> None:
    chat = read(tmp_path, [QUESTION, {"question": "c", "answer": "d"}, {"text": None}], chat=TEMPLATE)
    assert chat.texts == ["<user>a<assistant>b", "<user>c<assistant>d"]
    assert (chat.separator, chat.description) == ("", "records.jsonl, chat template")
    mixed = read(tmp_path, [QUESTION, {"text": "u"}], chat=TEMPLATE)
    assert (mixed.texts, mixed.separator, mixed.description) == (["<user>a<assistant>b", "u"], "\n\n", "records.jsonl")


def test_without_a_template_messages_are_joined_by_line_breaks(tmp_path: Path) -> None:
    result = read(tmp_path, [QUESTION, {"messages": TURNS}], chat=Chat(note="no template"))
    assert result.texts == ["a\nb", "a\nb"]
    assert (result.separator, result.description) == ("\n\n", "records.jsonl")
    assert result.notes == (f"{tmp_path / 'records.jsonl'}: no template",)
    assert not read(tmp_path, [{"text": "a"}], chat=Chat(note="no template")).notes


@pytest.mark.parametrize("chat", [None, TEMPLATE, FIRST], ids=["plain", "template", "first"])
def test_a_named_field_comes_before_all(chat: Chat | None, tmp_path: Path) -> None:
    record = QUESTION | {"text": "t", "parts": ["x", "y"]}
    assert read(tmp_path, [record], "output", chat).texts == ["b"]
    assert read(tmp_path, [record], "instruction, output", chat).texts == ["a\nb"]
    assert read(tmp_path, [record], "parts,text", chat).texts == ["x\ny\nt"]


def test_a_named_field_of_messages_is_a_conversation(tmp_path: Path) -> None:
    record = {"text": "t", "talk": TURNS}
    assert read(tmp_path, [record], "talk", TEMPLATE).texts == ["<user>a<assistant>b"]
    assert read(tmp_path, [record], "talk").texts == ["a\nb"]


def test_a_field_that_is_none_is_refused(tmp_path: Path) -> None:
    check_message(refused(tmp_path, [QUESTION], ","), "','", "names no field")


def test_parts_that_are_no_text_are_left_out_with_a_count(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image", "url": "x"}]
    records = [{"messages": [{"role": "user", "content": parts}, TURNS[1]]}, {"messages": TURNS}]
    result = read(tmp_path, records, chat=TEMPLATE)
    assert result.texts == ["<user>a<assistant>b"] * 2
    (note,) = result.notes
    assert "1 of 2 records have parts that aren't text" in note
    assert "line 1 (image)" in note


def test_halves_of_surrogate_pairs_are_replaced_with_a_count(tmp_path: Path) -> None:
    result = read(tmp_path, ["a\ud800b", "c", {"text": "\udc00\ud800"}, "\U0001f600"])
    assert result.texts == ["a\ufffdb", "c", "\ufffd\ufffd", "\U0001f600"]
    (note,) = result.notes
    assert "2 of 4 records have halves of surrogate pairs" in note
    assert "line 1" in note


def test_names_of_fields_are_shown_in_part_and_without_control_characters(tmp_path: Path) -> None:
    error = refused(tmp_path, [{f"\x1b[31m\n{i}" + "x" * 500: i for i in range(999)}])
    check_message(error, "and 979 more")
    assert len(error.found) < 2000
    assert error.found.isprintable()
