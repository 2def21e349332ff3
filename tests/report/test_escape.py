"""Names read back as themselves by a shell, by Python and by a reader of Markdown."""

import ast
import html
import re
import shutil
import subprocess

import pytest

from eigenslice.report.escape import markdown, python_string, shell_words

NAMES = [
    "plain-1.5B",
    "a|b`c",
    "<script>alert(1)</script>",
    "]]>",
    "'\"\\",
    "x\ny",
    "```\n# x",
    "\u202egpj",
    "*b* _c_ ~d~ [e](f)",
    "$(id) `id` !",
    "\x1b[31m",
    "über/模型",
    "a\udcff",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_python_reads_the_name(name: str) -> None:
    literal = python_string(name)
    assert literal.isprintable()
    assert ast.literal_eval(literal) == name


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_shell_reads_the_names() -> None:
    line = shell_words(["printf", "%s\\0", *NAMES])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [name.encode("utf-8", "surrogateescape") for name in NAMES]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_markdown_has_nothing_to_obey(name: str) -> None:
    """What is left are letters, and punctuation behind a backslash; there is no tag, no cell and no code."""
    escaped = markdown(name, starts=True)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*_\[\]~<>]", escaped.replace("\\\\", ""))
    if name.isprintable():
        assert html.unescape(re.sub(r"\\(.)", r"\1", escaped)) == name


@pytest.mark.parametrize("name", ["# x", "- x", "1. x", "12) x", "+ x", "---", "> x"])
def test_a_line_that_starts_with_a_name_is_a_line_of_text(name: str) -> None:
    assert not re.match(r"[#>+-]|\d+[.)]", markdown(name, starts=True))
