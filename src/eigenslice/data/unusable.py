"""Records that can't be used, and why."""

from typing import Any

FIELDS = 20  # that are listed of a record
LETTERS = 40  # of each field's name
KINDS = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


class UnusableError(Exception):
    """A record is left out; its message continues "record 3 ...".

    Attributes:
        next_step: Advice if all records are like this one; None advises to name the field.
        blank: True if the record is merely empty.
    """

    def __init__(self, reason: str, next_step: str | None = None, blank: bool = False) -> None:
        super().__init__(reason)
        self.next_step, self.blank = next_step, blank


def kind_of(value: Any) -> str:
    """Return the kind of a value in words."""
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    return KINDS.get(type(value), type(value).__name__)


def fields_of(record: dict[Any, Any]) -> str:
    """Return the names of a record's first fields."""
    names = [str(name) for name in record]
    shown = [name if len(name) <= LETTERS else f"{name[:LETTERS]} ..." for name in names[:FIELDS]]
    return f"{shown}" + (f" and {len(names) - FIELDS} more" if len(names) > FIELDS else "")
