"""The one description of each option, written beside its field: help, panel, flag and range.

The command line (`cli/commands.py`), its page (`docs/options.md`) and the checks of numbers are made from it.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError

SIZE, CALIBRATION, RESULT, MACHINE, OUTPUT = "Size", "Calibration", "Result", "Machine", "Output"
TRAINING, ADAPTERS, TEXT, TASKS, WRITING = "Training", "Adapters", "Text", "Tasks", "Writing"
WORK, MEASUREMENTS = "Work", "Measurements"
PANELS = (
    *(None, SIZE, TRAINING, MEASUREMENTS, TEXT, TASKS, WRITING, WORK),
    *(ADAPTERS, CALIBRATION, RESULT, MACHINE, OUTPUT),
)
"""Groups of options in --help, in their order. None is the group without a name, for required options."""
Described = TypeVar("Described")


@dataclass(frozen=True)
class Option:
    """The form of a field on the command line; the field has the default.

    Attributes:
        help: The option in one sentence.
        panel: The group that it is shown in.
        hint: The default in words, if the field's default is None or too long to show.
        flags: Names of the option, if they differ from the field's name.
        argument: True if the value is given by its position, without a flag.
        joined: True if a value is a list, joined by commas.
    """

    help: str
    panel: str | None = None
    hint: str = ""
    flags: tuple[str, ...] = ()
    argument: bool = False
    joined: bool = False

    def names(self, name: str) -> tuple[str, ...]:
        """The option's flags, for a field of this name."""
        return self.flags or (f"--{name.replace('_', '-')}",)


@dataclass(frozen=True)
class Range:
    """Numbers that a field takes; neither NaN nor an infinite number is among them.

    Attributes:
        low: The smallest value.
        high: The largest value.
        allowed: The range in words.
        next_step: Advice to a user who gave another number.
    """

    low: float
    high: float
    allowed: str
    next_step: str = "leave it out for the default"


@dataclass(frozen=True)
class Nested:
    """A field with a model of its own; the model's fields become options, too.

    Attributes:
        parts: Description of each offered field; None takes the model's description. Without parts, all fields are
            offered.
    """

    parts: dict[str, Option | None] = field(default_factory=dict)


class Options(BaseModel):
    """Options of a verb: frozen, complete, and numbers in their ranges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _in_range(self) -> "Options":
        """Refuse numbers out of range; None stands for a default."""
        for name in type(self).model_fields:
            limits, value = described(type(self), name, Range), getattr(self, name)
            if limits and value is not None and not limits.low <= value <= limits.high:
                raise OptionsError(
                    f"{flag_of(type(self), name)} {value}", allowed=limits.allowed, next_step=limits.next_step
                )
        return self


def described(kind: type[BaseModel], name: str, by: type[Described]) -> Described | None:
    """Return the `Option`, `Range` or `Nested` that is written beside a field; None if there is none."""
    return next((found for found in kind.model_fields[name].metadata if isinstance(found, by)), None)


def type_of(kind: type[BaseModel], name: str) -> Any:
    """Return a field's type, without the annotations beside it."""
    return get_type_hints(kind)[name]


def flag_of(kind: type[BaseModel], name: str) -> str:
    """Return the flag that sets a field. An unknown field, such as an older version's, gets the flag of its name."""
    option = described(kind, name, Option) if name in kind.model_fields else None
    return (option or Option("")).names(name)[0]


def flag_at(title: str, place: tuple[int | str, ...]) -> str | None:
    """Return the flag of the field that an error of pydantic names; None if the field is in no options.

    Args:
        title: The name of the model.
        place: Names of fields, from the outermost one on. Parts behind the last field are ignored.
    """
    kind: Any = next((kind for kind in Options.__subclasses__() if kind.__name__ == title), None)
    flag, parts = None, {}
    for name in place:
        if kind is None or name not in kind.model_fields:
            break
        name = str(name)
        flag = (parts.get(name) or Option("", flags=(flag_of(kind, name),))).names(name)[0]
        nested = described(kind, name, Nested)
        kind, parts = (type_of(kind, name), nested.parts) if nested else (None, {})
    return flag


def nested_of(kind: type[BaseModel]) -> str | None:
    """The name of the field with a model of its own, if there is one."""
    return next((name for name in kind.model_fields if described(kind, name, Nested)), None)
