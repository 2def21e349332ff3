"""Records with instructions and answers, as a chat model sees them in use."""

from collections.abc import Callable
from typing import Any

Message = dict[str, str]
Render = Callable[[dict[str, Any]], str | None]
"""Text of a record; None if it is no conversation."""

QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("response", "output", "completion", "answer")
ROLES = {"human": "user", "gpt": "assistant"}


def messages_of(record: dict[str, Any]) -> list[Message] | None:
    """The messages of a record; None if it is no conversation.

    A conversation has `messages` or `conversations` (each with `role` and `content`, or `from` and `value`), or a
    question (`instruction` with an optional `input`, `prompt` or `question`) and an answer (`response`, `output`,
    `completion` or `answer`).
    """
    for field in ("messages", "conversations"):
        if isinstance(record.get(field), list):
            return _turns(record[field])
    question = next((record[name] for name in QUESTIONS if _text(record.get(name))), None)
    answer = next((record[name] for name in ANSWERS if _text(record.get(name))), None)
    if question is None or answer is None:
        return None
    if _text(record.get("input")):
        question = f"{question}\n\n{record['input']}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _turns(turns: list[Any]) -> list[Message] | None:
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages or None


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def chat_renderer(tokenizer: Any) -> Render | None:
    """A function that writes records in a tokenizer's chat template; None if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(record: dict[str, Any]) -> str | None:
        messages = messages_of(record)
        return None if messages is None else tokenizer.apply_chat_template(messages, tokenize=False)

    return render
