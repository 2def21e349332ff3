"""docs/options.md, written from the options of all verbs: `python -m eigenslice.cli.reference`."""

from collections.abc import Iterator
from itertools import groupby
from textwrap import fill
from typing import Any, Literal, get_args, get_origin

from eigenslice.cli import VERBS
from eigenslice.cli.commands import Flag, Verb, flags_of

INTRODUCTION = """# Options

Every option of every command. `eigenslice COMMAND --help` shows the same. Options may be given in any order. An option
that takes several values is repeated: `--calibration alpaca --calibration code`.

This page is written from the code by `make docs`.
"""
WIDTH = 120
HEADER = ("option", "values", "default", "meaning")
WORDS = {"str": "text", "Path": "path", "int": "whole number", "float": "number"}


def reference() -> str:
    """The page, in Markdown."""
    return INTRODUCTION + "".join(_verb(name, verb) for name, verb in VERBS.items())


def _verb(name: str, verb: Verb) -> str:
    text = fill(" ".join((verb.__doc__ or "").split()), WIDTH, break_on_hyphens=False)
    flags = flags_of(verb)
    arguments = [flag for flag in flags if flag.option.argument]
    usage = " ".join(["eigenslice", name, *(_placeholder(flag) for flag in arguments), "[OPTIONS]"])
    lines = [
        f"\n## {name}\n",
        f"`{usage}`\n",
        f"{text}\n",
        *(f"- `{_placeholder(f)}`: {f.option.help}" for f in arguments),
    ]
    others = [flag for flag in flags if not flag.option.argument]
    for panel, members in groupby(others, key=lambda flag: flag.option.panel):
        lines += ["", f"**{panel or 'Required'}**\n", *_table(members)]
    return "\n".join(lines) + "\n"


def _placeholder(flag: Flag) -> str:
    return f"{flag.key.upper()}{'...' if get_origin(flag.type) is list else ''}"


def _table(flags: Iterator[Flag]) -> Iterator[str]:
    yield _row(*HEADER)
    yield _row(*["---"] * len(HEADER))
    for flag in flags:
        names = [*flag.names, *([flag.negative] if flag.negative else [])]
        yield _row(", ".join(f"`{name}`" for name in names), _values(flag), _default(flag), flag.option.help)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _values(flag: Flag) -> str:
    """The values that an option takes: choices, a range, or a type in words."""
    if flag.is_switch:
        return ""
    if flag.range:
        return flag.range.allowed
    return ", ".join(dict.fromkeys(_kinds(flag.type)))


def _kinds(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from (f"`{choice}`" for choice in get_args(kind))
    elif get_args(kind):
        for part in get_args(kind):
            yield from _kinds(part)
    elif kind not in (type(None), ...):
        yield WORDS[kind.__name__]


def _default(flag: Flag) -> str:
    if flag.option.hint or flag.default in (..., None, ()):
        return flag.option.hint
    if isinstance(flag.default, bool):
        return "yes" if flag.default else "no"
    return ", ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default)


if __name__ == "__main__":
    print(reference(), end="")
