"""Chat templates: somebody else's programs."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from eigenslice.data import templates
from eigenslice.data.conversations import Conversation
from eigenslice.data.templates import ChatTemplate
from eigenslice.data.unusable import UnusableError
from eigenslice.errors import CalibrationError
from tests import words
from tests.messages import check_message

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
IN_PARTS = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)
TALK = Conversation([{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}])


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    """One process for all tests whose templates take contents of text."""
    tokenizer = words.tokenizer()
    tokenizer.chat_template = PLAIN
    with ChatTemplate(tokenizer) as opened:
        yield opened


def write(template: ChatTemplate, chat_template: Any, conversation: Conversation = TALK) -> str:
    template._tokenizer.chat_template = chat_template
    return template(conversation)


def test_conversations_are_written_as_transformers_writes_them(template: ChatTemplate) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "ä\u2028ö"}}]
    messages = [*TALK.messages, {"role": "assistant", "tool_calls": [{"a": None}], "thinking": "why"}]
    for chat_template in (
        PLAIN,
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "{{ tools | tojson(indent=1) }}{{ messages[2].tool_calls }}{{ messages[2].reasoning_content }}",
        {"default": PLAIN, "tool_use": "{{ tools }}"},
    ):
        tokenizer = words.tokenizer()
        tokenizer.chat_template = chat_template
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert write(template, chat_template, Conversation(messages, tools)) == expected != ""


@pytest.mark.parametrize(
    ("chat_template", "why"),
    [
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('not\nthis one') }}", "TemplateError: not this one"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "characters"),
        (" \n ", "nothing in the chat template"),
        (5, "is refused by the chat template"),
        ({"one": PLAIN, "two": PLAIN}, "multiple chat templates"),
    ],
)
def test_templates_that_fail_say_why(chat_template: Any, why: str, template: ChatTemplate) -> None:
    with pytest.raises(UnusableError) as caught:
        write(template, chat_template)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "template" in (caught.value.next_step or "")
    assert write(template, PLAIN) == "<user>w5<assistant>w6"


def test_a_record_that_a_template_refuses_is_no_reason_to_refuse_others(template: ChatTemplate) -> None:
    assert write(template, ALTERNATE) == "w5w6"
    with pytest.raises(UnusableError, match="roles must alternate"):
        write(template, ALTERNATE, Conversation(TALK.messages * 2 + TALK.messages[:1] * 2))


def test_templates_that_want_parts_get_parts() -> None:
    tokenizer = words.tokenizer()
    tokenizer.chat_template = IN_PARTS
    with ChatTemplate(tokenizer) as template:
        assert template(TALK) == "<user>w5<assistant>w6"


def test_a_tokenizer_that_writes_conversations_itself_does() -> None:
    class Own(type(words.tokenizer())):
        def apply_chat_template(self, conversation: Any, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
            return "own" + conversation[0]["content"]

    tokenizer = words.tokenizer()
    tokenizer.__class__ = Own
    with ChatTemplate(tokenizer) as template:
        assert template(TALK) == "ownw5"
        assert template._process is None


@pytest.mark.parametrize("in_thread", [False, True])
def test_templates_have_a_limit_of_time(in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    tokenizer = words.tokenizer()
    tokenizer.chat_template = ENDLESS
    errors: list[BaseException] = []

    def run() -> None:
        with ChatTemplate(tokenizer) as template:
            try:
                template(TALK)
            except CalibrationError as error:
                errors.append(error)

    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    (error,) = errors
    assert isinstance(error, CalibrationError)
    check_message(error, "chat template takes too long")


def test_the_limit_is_one_of_all_conversations_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MORE_SECONDS", -100.0)
    tokenizer = words.tokenizer()
    tokenizer.chat_template = PLAIN
    with ChatTemplate(tokenizer) as template, pytest.raises(CalibrationError, match="takes too long"):
        template(TALK)  # which asks twice: how contents are written, too
