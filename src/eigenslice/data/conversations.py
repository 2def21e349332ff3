"""Conversations in records: their messages, as chat templates take them."""

import json
from dataclasses import dataclass
from typing import Any

from eigenslice.data.unusable import UnusableError, kind_of

Message = dict[str, Any]

TURNS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question")
CONTEXTS = ("input", "context")
ANSWERS = ("response", "output", "completion", "answer")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
SAID_OTHERWISE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that may say something where its content is empty."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a record.

    Attributes:
        messages: Messages with `role`, `content` (text) and any other fields.
        tools: Descriptions of tools that the assistant may call, None for none.
        left_out: Kinds of the parts that aren't text, such as "image".
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    left_out: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The contents alone, one below the other."""
        return "\n".join(m["content"] for m in self.messages if m.get("content", "").strip())


def conversation_of(record: dict[str, Any]) -> Conversation | None:
    """Return the conversation in a record, None if there is none.

    A conversation has one of two forms:

    - `messages`, `conversations` or `conversation`: each message has `role` and `content`, or `from` and `value`.

    - A question (`instruction`, `prompt` or `question`, with an optional `input` or `context`) and an answer
      (`response`, `output`, `completion` or `answer`).

    Raises:
        UnusableError: an answer is empty, or a message can't be read.
    """
    for field in TURNS:
        turns = _listed(record.get(field))
        if turns is not None:
            return _conversation(turns, field, record.get("tools"))
    question = next((name for name in QUESTIONS if name in record), None)
    answer = next((name for name in ANSWERS if _full(record.get(name))), None)
    answer = answer or next((name for name in ANSWERS if name in record), None)
    if question is None or answer is None:
        return None
    if isinstance(record[question], list) and isinstance(record[answer], list):
        return _conversation(record[question] + record[answer], answer, record.get("tools"))
    return _answered(record, answer)


def turns_in(value: Any) -> bool:
    """Return whether a field's value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _answered(record: dict[str, Any], answer: str) -> Conversation:
    question = next((name for name in QUESTIONS if _full(record.get(name))), None)
    asked = [record[name] for name in (question, *CONTEXTS) if name and name != answer and _full(record.get(name))]
    if not asked:
        named = next(name for name in QUESTIONS if name in record)
        raise UnusableError(f"has no text in {named} ({kind_of(record[named])})")
    if not _full(record[answer]):
        raise UnusableError(f"has no text in {answer} ({kind_of(record[answer])})")
    user = {"role": "user", "content": "\n\n".join(asked)}
    return Conversation([user, {"role": "assistant", "content": record[answer]}])


def _conversation(turns: list[Any], field: str, tools: Any) -> Conversation:
    if not turns:
        raise UnusableError(f"has no messages in {field}")
    left_out: list[str] = []
    messages = [_message(turn, number, field, left_out) for number, turn in enumerate(turns, 1)]
    if not any(_says(message) for message in messages):
        raise UnusableError(f"has no text in its {field}")
    return Conversation(messages, _tools(tools), tuple(left_out))


def _message(turn: Any, number: int, field: str, left_out: list[str]) -> Message:
    """A message with a role that templates know and a content of text; kinds of other parts are added to left_out."""
    where = f"message {number} of its {field}"
    if not isinstance(turn, dict):
        raise UnusableError(f"has {kind_of(turn)} as {where}")
    role = _first(turn, "role", "from")
    if not isinstance(role, str) or not role.strip():
        raise UnusableError(f"has no role in {where}, which has {', '.join(map(str, turn))}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value") and value is not None}
    message = rest | {"role": ROLES.get(role.strip().lower(), role)}
    content = _first(turn, "content", "value")
    if content is not None or not _says(message):
        message["content"] = _content(content, where, left_out)
    if message["role"] == "assistant" and not _says(message):
        raise UnusableError(f"has an empty answer, {where}")
    return message


def _first(turn: dict[str, Any], *names: str) -> Any:
    """The first of these fields that isn't null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _content(content: Any, where: str, left_out: list[str]) -> str:
    """The text of a content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise UnusableError(f"has no text in {where} ({kind_of(content)})")
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            left_out.append(str(part.get("type", "nothing")) if isinstance(part, dict) else kind_of(part))
    return "".join(texts)


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    listed = _listed(tools)
    if listed and not all(isinstance(tool, dict) for tool in listed):
        raise UnusableError("has tools that are no objects")
    if listed is None and _full(tools):
        raise UnusableError("has tools that are no list")
    return listed or None


def _listed(value: Any) -> list[Any] | None:
    """A list, or the one that a text holds as JSON, as columns of tables do; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _says(message: Message) -> bool:
    return _full(message.get("content")) or any(message.get(name) for name in SAID_OTHERWISE)


def _full(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
