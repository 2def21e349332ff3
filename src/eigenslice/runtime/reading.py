"""Reading small files that anyone may have written: bounded, and never waiting for a pipe."""

import json
import stat
from pathlib import Path
from typing import Any

MIB = 1024**2
LEVELS = 64
"""Deepest allowed nesting in a JSON file; deeper nesting breaks functions that walk through the values."""


def read_text(path: Path, most: int) -> str:
    """The text of an ordinary file, in UTF-8 with or without a byte order mark.

    Args:
        path: The file; links are followed.
        most: Bytes that it may have.

    Raises:
        OSError: it can't be read.
        ValueError: it is no ordinary file, larger, or not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no ordinary file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content.decode("utf-8-sig")


def read_json(path: Path, most: int = 16 * MIB) -> Any:
    """The content of a JSON file, see `read_text`.

    Raises:
        OSError: it can't be read.
        ValueError: it is no ordinary file, larger, no JSON, or nested too deep.
    """
    return parsed_json(read_text(path, most))


def parsed_json(text: str, unique: bool = False) -> Any:
    """JSON's value.

    Args:
        text: The JSON.
        unique: Refuse objects that have a field twice.

    Raises:
        ValueError: it is no JSON, or nested deeper than anything that is meant.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value]
    for _ in range(LEVELS):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _values(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {LEVELS} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a field is there twice")
    return values


def _values(outer: Any) -> Any:
    return outer.values() if isinstance(outer, dict) else outer
