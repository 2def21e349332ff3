"""Changing one value after the other in what a JSON file holds."""

import copy
from collections.abc import Iterator
from typing import Any

Steps = tuple[str | int, ...]


def places(value: Any, before: Steps = ()) -> Iterator[Steps]:
    """All places in a JSON value; of a list, the first entry's."""
    yield before
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*before, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*before, 0))


def changed(content: dict[str, Any], place: Steps, value: Any) -> Any:
    """A copy with another value in one place; ... takes the field out."""
    content = copy.deepcopy(content)
    inner: Any = content
    for step in place[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content
