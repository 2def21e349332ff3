"""Metadata of the dense model's card that holds for the sliced model, too: licence and language."""

import re
import warnings
from pathlib import Path
from typing import Any

import yaml

from eigenslice.errors import EigensliceWarning, first_line, printable

INHERITED = ("license", "license_name", "license_link", "language")
FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
"""The metadata at a card's start."""
FIELD = re.compile(rf"^({'|'.join(INHERITED)})[ \t]*:.*(?:\n|\Z)(?:[ \t-].*(?:\n|\Z)|[ \t]*\n)*", re.MULTILINE)
"""One field with all lines that belong to it. Other fields may hold anything and are never parsed."""
LONGEST_CARD = 4 * 1024**2
"""Bytes in which the metadata end: lists of measurements can be long."""
LONGEST_FIELD = 8 * 1024
LONGEST_VALUE = 500
MOST_LANGUAGES = 500


def read_card_metadata(path: Path, warn: bool = True) -> dict[str, Any]:
    """Licence and language in a model card.

    No content of a card is an error: fields that can't be understood are left out, with a warning.

    Args:
        path: The card; there may be none.
        warn: True to warn of fields that are left out.

    Returns:
        `license`, `license_name` and `license_link` (texts), `language` (a text or a list of texts), as far as they are
        there.
    """
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            text = file.read(LONGEST_CARD).decode("utf-8-sig", errors="replace")
    except (OSError, ValueError) as error:
        _left_out(f"{path} can't be read ({first_line(error)})", warn)
        return {}
    front = FRONT.match(text)
    metadata: dict[str, Any] = {}
    fields = {field[1]: field[0] for field in FIELD.finditer(front[1])} if front else {}  # the last one counts
    for name, field in fields.items():
        value = _value(field)
        if value is None:
            _left_out(f"{path} has {name} of another kind than a card's", warn)
        elif value:
            metadata[name] = value
    return metadata


def _left_out(what: str, warn: bool) -> None:
    if warn:
        warnings.warn(f"{what}: the result's card goes without it", EigensliceWarning, stacklevel=3)


def _value(field: str) -> str | list[str] | None:
    """Return the value of a field, "" for an empty field, or None if the value is no licence and no language."""
    try:
        if len(field) > LONGEST_FIELD:
            return None
        # BaseLoader: Norwegian is "no", not False; and no aliases, dates or numbers
        ((name, value),) = yaml.load(field, yaml.BaseLoader).items()
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError):
        return None
    if isinstance(value, str) and len(value) <= LONGEST_VALUE:
        return value if printable(value) == value else None
    if name == "language" and isinstance(value, list) and len(value) <= MOST_LANGUAGES:
        fits = all(isinstance(one, str) and one and len(one) <= LONGEST_VALUE and one.isprintable() for one in value)
        return value if fits else None
    return None
