"""Conversations in records."""

import json
from typing import Any

import pytest

from eigenslice.data.conversations import conversation_of
from eigenslice.data.unusable import UnusableError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def said(record: dict[str, Any]) -> list[tuple[str, str]]:
    found = conversation_of(record)
    assert found
    return [(m["role"], m["content"]) for m in found.messages]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": None, "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "c", "output": "b"}, [("user", "a\n\nc"), ("assistant", "b")]),
        ({"instruction": "a", "context": "c", "response": "b"}, [("user", "a\n\nc"), ("assistant", "b")]),
        ({"instruction": "", "input": "c", "output": "b"}, [("user", "c"), ("assistant", "b")]),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"question": "a", "answer": "b", "number": 5}, [("user", "a"), ("assistant", "b")]),
        ({"question": "a", "response": "", "answer": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, [("user", "a"), ("assistant", "b")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"conversations": [{"from": "system", "value": ""}, {"from": "Human", "value": "a", "role": None}]},
            [("system", ""), ("user", "a")],
        ),
        ({"messages": [{"role": "system", "content": "s"}]}, [("system", "s")]),
        ({"messages": TURNS, "prompt": "x", "completion": "y"}, [("user", "a"), ("assistant", "b")]),
        ({"messages": json.dumps(TURNS)}, [("user", "a"), ("assistant", "b")]),
        ({"messages": [{"role": "expert", "content": "a"}]}, [("expert", "a")]),
    ],
    ids=str,
)
def test_messages(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert said(record) == expected


@pytest.mark.parametrize(
    "record", [{"text": "a"}, {"question": "a"}, {"messages": None}, {"messages": "a"}, {}], ids=str
)
def test_other_records_are_none(record: dict[str, Any]) -> None:
    assert conversation_of(record) is None


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"instruction": "a", "output": ""}, "has no text in output (empty)"),
        ({"instruction": "a", "output": None}, "has no text in output (null)"),
        ({"question": "a", "answer": 5}, "has no text in answer (a number)"),
        ({"question": " ", "answer": "b"}, "has no text in question (empty)"),
        ({"messages": []}, "has no messages in messages"),
        ({"messages": ["a"]}, "has text as message 1 of its messages"),
        ({"messages": [{"content": "a"}]}, "has no role in message 1"),
        ({"messages": [{"role": 3, "content": "a"}]}, "has no role in message 1"),
        ({"messages": [{"role": "user", "content": 3}]}, "has no text in message 1 of its messages (a number)"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": ""}]}, "an empty answer, message 2"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "no text in message 2"),
        ({"conversations": [{"from": "human", "value": " "}]}, "has no text in its conversations"),
        ({"messages": TURNS, "tools": "none"}, "has tools that are no list"),
        ({"messages": TURNS, "tools": ["f"]}, "has tools that are no objects"),
    ],
    ids=str,
)
def test_conversations_that_can_not_be_used_say_why(record: dict[str, Any], why: str) -> None:
    with pytest.raises(UnusableError) as caught:
        conversation_of(record)
    assert why in str(caught.value)


def test_text_parts_are_text_and_others_are_named() -> None:
    parts: list[Any] = [{"type": "text", "text": "look: "}, {"type": "image", "url": "x"}, "a", {"text": "b"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": {"text": "c"}}]}
    assert said(record) == [("user", "look: ab"), ("assistant", "c")]
    found = conversation_of(record)
    assert found
    assert found.left_out == ("image",)


def test_calls_of_tools_need_no_content() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "5"},
        {"role": "assistant", "content": "", "reasoning_content": "why"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        found = conversation_of({"messages": turns, "tools": given})
        assert found
        assert found.tools == tools
        assert found.messages[1] == {"role": "assistant", "tool_calls": [call]}
        assert found.messages[2:] == turns[2:]
        assert found.plain == "a\n5"
