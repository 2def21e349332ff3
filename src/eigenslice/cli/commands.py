"""Commands of typer, made from the options of a verb: fields of models in `options/`, and options of its own."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from eigenslice.options.flags import PANELS, Nested, Option, Options, Range, described, type_of

Model = TypeVar("Model", bound=Options)
Verb = Callable[..., None]


@dataclass(frozen=True)
class Given(Generic[Model]):
    """The options of a model that the user gave.

    Attributes:
        kind: The model.
        values: Fields by name; of a field with a model of its own, a dictionary of its fields.
    """

    kind: type[Model]
    values: dict[str, Any]

    def options(self, revision: str | None = None) -> Model:
        """Return the model's options: given options and defaults.

        Args:
            revision: The hub's revision of the field `model`.

        Raises:
            OptionsError: a value isn't allowed.
        """
        return self.kind(**{name: self._complete(name, value) for name, value in self.at(revision).items()})

    def at(self, revision: str | None) -> dict[str, Any]:
        """The values, with the hub's revision of the field `model`."""
        from eigenslice.checkpoint.hub import with_revision

        changed = {} if revision is None else {"model": with_revision(self.values["model"], revision)}
        return self.values | changed

    def _complete(self, name: str, value: Any) -> Any:
        """Return the value of a field. A nested model has the field's defaults, not the defaults of its class."""
        if not described(self.kind, name, Nested):
            return value
        default = self.kind.model_fields[name].default
        return value if default == type(default)() else default.model_dump() | value


@dataclass(frozen=True)
class Flag:
    """An option of a verb.

    Attributes:
        path: The verb's parameter, then the field of its model, then the part of a nested model.
        type: The type of the value.
        default: The value without the option; `...` if it is required, None if other options are taken then.
        option: The option's description.
        range: The allowed numbers.
    """

    path: tuple[str, ...]
    type: Any
    default: Any
    option: Option
    range: Range | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Flags as they are typed; the name of an argument."""
        return (self.path[-1],) if self.option.argument else self.option.names(self.path[-1])

    @property
    def key(self) -> str:
        """The name of typer's parameter."""
        return self.names[0].lstrip("-").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """True if the option has no value."""
        return self.type is bool or bool in get_args(self.type)

    @property
    def negative(self) -> str | None:
        """The flag for no, where the default isn't no."""
        return f"--no-{self.names[0].removeprefix('--')}" if self.is_switch and self.default is not False else None


def command(verb: Verb) -> Verb:
    """The function that typer makes a command of; it calls the verb with the user's choices."""
    flags = flags_of(verb)
    kinds = _models(verb)

    def run(context: typer.Context, **values: Any) -> None:
        # ParameterSource is a private class of typer's
        given = {key for key in values if getattr(context.get_parameter_source(key), "name", "") == "COMMANDLINE"}
        arguments: dict[str, Any] = {name: Given(kind, {}) for name, kind in kinds.items()}
        for flag in _all_flags(verb):
            if flag.key in given:
                _put(arguments, flag, values[flag.key])
        verb(**arguments)

    run.__doc__ = verb.__doc__
    run.__annotations__ = {"context": typer.Context} | {flag.key: _annotation(flag) for flag in flags}
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    run.__signature__ = inspect.Signature([*parameters, *map(_parameter, flags)])  # pyright: ignore
    return run


def flags_of(verb: Verb) -> list[Flag]:
    """Options of a verb in the order of --help: by panel, nested models first. Models share options of one name."""
    flags: dict[str, Flag] = {}
    for flag in _all_flags(verb):
        flags.setdefault(flag.key, flag)
    return sorted(flags.values(), key=lambda flag: (PANELS.index(flag.option.panel), len(flag.path) < 3))


def _models(verb: Verb) -> dict[str, type[Options]]:
    """Return the models of a verb's options, by its parameters."""
    hints = get_type_hints(verb)
    return {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is Given}


def _all_flags(verb: Verb) -> Iterator[Flag]:
    models, hints = _models(verb), get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in models:
            yield from _of_model(models[name], name)
            continue
        kind, option = get_args(hints[name])
        default = ... if parameter.default is parameter.empty else parameter.default
        yield Flag((name,), kind, default, option)


def _of_model(kind: type[Options], parameter: str) -> Iterator[Flag]:
    for name, field in kind.model_fields.items():
        option, nested = described(kind, name, Option), described(kind, name, Nested)
        if nested:
            yield from _of_nested(nested, (parameter, name), field.default)
        elif option:
            default = None if option.joined else ... if field.is_required() else field.default
            yield Flag((parameter, name), type_of(kind, name), default, option, described(kind, name, Range))


def _of_nested(nested: Nested, path: tuple[str, ...], default: Options) -> Iterator[Flag]:
    kind = type(default)
    for name in nested.parts or kind.model_fields:
        option = nested.parts.get(name) or described(kind, name, Option)
        if option:
            limits = described(kind, name, Range)
            yield Flag((*path, name), type_of(kind, name), getattr(default, name), option, limits)


def _put(arguments: dict[str, Any], flag: Flag, value: Any) -> None:
    """Set the argument, the field, or the part of a nested field that a flag is for."""
    parameter, *fields = flag.path
    if not fields:
        arguments[parameter] = value
        return
    holder = arguments[parameter].values
    for name in fields[:-1]:
        holder = holder.setdefault(name, {})
    holder[fields[-1]] = _parsed(flag, value)


def _parsed(flag: Flag, value: Any) -> Any:
    """The value of a model's field, from typer's."""
    if flag.option.joined:
        return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    return tuple(value) if isinstance(value, list) else value


def _annotation(flag: Flag) -> Any:
    """The type that typer parses, and its own description of the option."""
    text = escape(f"{flag.option.help} [{flag.option.hint}]" if flag.option.hint else flag.option.help)
    if flag.option.argument:
        return Annotated[_kind(flag), typer.Argument(help=text)]
    first, *others = flag.names
    names = [f"{first}/{flag.negative}" if flag.negative else first, *others]
    shown = not flag.option.hint
    return Annotated[
        _kind(flag), typer.Option(*names, help=text, rich_help_panel=flag.option.panel, show_default=shown)
    ]


def _kind(flag: Flag) -> Any:
    """The type of an option, in typer's terms: several values are a list, alternatives but None are left out."""
    if flag.option.joined:
        return str | None
    options = get_args(flag.type) if get_origin(flag.type) in (Union, UnionType) else (flag.type,)
    many = next((option for option in options if get_origin(option) in (tuple, list)), None)
    if many:
        return list[get_args(many)[0]] | None if flag.default is not ... else list[get_args(many)[0]]
    return flag.type


def _parameter(flag: Flag) -> inspect.Parameter:
    default = inspect.Parameter.empty if flag.default is ... else flag.default
    default = list(default) or None if isinstance(default, tuple) else default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(flag.key, kind, default=default, annotation=_annotation(flag))
