"""One dial for the work of slicing: it sets the options that a user leaves out."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

Effort = Literal["fast", "default", "best"]
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {
        "trials": False,
        "fit_neurons": False,
        "own_text": 0.0,
        "calibration": {"samples": 32, "seqlen": 512},
    },
    "default": {},
    "best": {
        "own_text": 1.0,
        "heal": 1_000_000,
        "calibration": {"samples": 256},
    },
}
"""Fields of `SliceOptions` by effort; fields of a nested model are a dictionary."""


def with_effort(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a user has given, and the effort's settings of the other fields.

    Args:
        given: Fields of `SliceOptions` that were given. A nested model may be there as a dictionary, or as a model that
            knows its given fields.
    """
    fields = dict(given)
    for name, value in SETTINGS.get(str(given.get("effort", "default")), {}).items():
        nested = fields.get(name)
        if not isinstance(value, dict):
            fields.setdefault(name, value)
        elif isinstance(nested, BaseModel):
            left_out = {part: of for part, of in value.items() if part not in nested.model_fields_set}
            fields[name] = nested.model_copy(update=left_out)
        else:
            fields[name] = value | (nested or {})
    return fields


def effort_text(effort: Effort) -> str:
    """Return the options that an effort sets, as flags."""
    flags = []
    for name, value in SETTINGS[effort].items():
        for part, of in (value if isinstance(value, dict) else {name: value}).items():
            flag = part.replace("_", "-")
            if isinstance(of, bool):
                flags.append(f"--{flag}" if of else f"--no-{flag}")
            else:
                flags.append(f"--{flag} {round(of) if of == round(of) else of}")
    return " ".join(flags)
