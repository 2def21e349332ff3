"""Names in places that read more than names: Markdown, Python, a shell."""

import html
import json
import re
import shlex

from eigenslice.errors import printable

SPECIAL = re.compile(r"[\\`*_\[\]|~]")
"""Characters with a meaning in the middle of a line of Markdown, and ..."""
AT_START = re.compile(r"^[#>+=-]|^[0-9]+(?=[.)])")
"""... at its start."""


def markdown(text: str, starts: bool = False) -> str:
    """A text that Markdown, and the HTML that Markdown may hold, shows as it is, on one line.

    Args:
        text: The text.
        starts: True if a line starts with the text.
    """
    escaped = SPECIAL.sub(_backslash, html.escape(printable(text), quote=False))
    return AT_START.sub(_backslash, escaped) if starts else escaped


def _backslash(found: re.Match[str]) -> str:
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def python_string(text: str) -> str:
    """A Python literal of a text, in double quotes, on one line."""
    return printable(json.dumps(text, ensure_ascii=False))


def shell_words(words: list[str]) -> str:
    """A command line, on one line, of which a shell makes these words."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    bytes_ = word.encode("utf-8", errors="surrogateescape")
    inner = "".join(chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in bytes_)
    return f"$'{inner}'"  # as bash and zsh read it
