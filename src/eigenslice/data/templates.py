"""Conversations in a tokenizer's chat template, with a limit of time, memory and length."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any

from eigenslice.data.conversations import Conversation, Message
from eigenslice.data.unusable import UnusableError
from eigenslice.errors import CalibrationError, first_line, one_line

PROCESS = Path(__file__).with_name("template_process.py")
SECONDS = 10.0  # for one conversation; templates take milliseconds
MORE_SECONDS = 0.05  # for each conversation more: the average, in the end
START_SECONDS = 300.0  # for Python and transformers to load
PROBES = ("qzxquestion", "qzxanswer")
NEXT = "repair the tokenizer's chat template, or name the fields to read with --field"


class ChatTemplate:
    """Writes conversations in a tokenizer's chat template.

    transformers' own rendering runs in a process that can be ended at any moment and from any thread. It starts with
    the first conversation, and ends with the context. A tokenizer with a rendering of its own, which is code that the
    user trusts or a package's, renders here.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process: subprocess.Popen[str] | None = None
        self._in_parts: bool | None = None
        self._left = SECONDS

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def __call__(self, conversation: Conversation) -> str:
        """The text of a conversation.

        Raises:
            UnusableError: the template refuses it, is broken or writes nothing.
            CalibrationError: the template takes too long.
        """
        if self._in_parts is None:
            self._in_parts = self._wants_parts()
        messages = _in_parts(conversation.messages) if self._in_parts else conversation.messages
        text = self._render(messages, conversation.tools)
        if not text.strip():
            raise UnusableError("is nothing in the chat template", NEXT)
        return text

    def _wants_parts(self) -> bool:
        """Return whether the template writes only lists of parts, like templates of models that read images."""
        probe: list[Message] = [
            {"role": role, "content": word} for role, word in zip(("user", "assistant"), PROBES, strict=True)
        ]
        return not self._writes(probe) and self._writes(_in_parts(probe))

    def _writes(self, probe: list[Message]) -> bool:
        try:
            text = self._render(probe, None)
        except UnusableError:
            return False
        return all(word in text for word in PROBES)

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._tokenizer
        try:
            if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
                return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
            asked = json.dumps(
                {
                    "messages": messages,
                    "tools": tools,
                    "template": tokenizer.get_chat_template(None, tools),
                    "special": tokenizer.special_tokens_map,
                },
                default=str,
            )
        except Exception as error:  # several templates and none to take, a record that is too deep, a tokenizer's own
            raise UnusableError(f"is refused by the chat template ({first_line(error)})", NEXT) from error
        answer = self._ask(asked)
        if "error" in answer:
            raise UnusableError(f"is refused by the chat template ({one_line(answer['error'])})", NEXT)
        return answer["text"]

    def _ask(self, asked: str) -> dict[str, str]:
        if self._process is None:
            self._process = _start()
            self._answer(START_SECONDS)
        if self._left <= 0:
            raise _too_slow()
        assert self._process.stdin
        try:
            self._process.stdin.write(asked + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which its answer tells
        begun = time.monotonic()
        answer = self._answer(min(SECONDS, self._left))
        self._left += MORE_SECONDS - (time.monotonic() - begun)
        return answer

    def _answer(self, seconds: float) -> dict[str, str]:
        process = self._process
        assert process
        assert process.stdout
        timer = Timer(max(seconds, 0.0), process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        raise _too_slow()


def _too_slow() -> CalibrationError:
    return CalibrationError(
        "the tokenizer's chat template takes too long, or too much memory",
        allowed=f"a template that takes less than {SECONDS:g} seconds for a conversation, and "
        f"{1000 * MORE_SECONDS:g} milliseconds on average",
        next_step=NEXT,
    )


def _start() -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", str(PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        )
    except OSError as error:
        raise CalibrationError(
            f"the process that writes chat templates can't be started ({first_line(error)})",
            allowed="a system that can start another Python process",
            next_step="name the fields to read with --field, or free memory",
        ) from error


def _in_parts(messages: list[Message]) -> list[Message]:
    """The same messages with each content as a list of one part."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} if "content" in m else m for m in messages]
