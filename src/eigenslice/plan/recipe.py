"""Plans from files: an eigenslice.json, or YAML with the fields of its `plan`."""

from pathlib import Path
from typing import Any, NoReturn

import yaml

from eigenslice.errors import OptionsError, first_line
from eigenslice.runtime.reading import MIB, parsed_json, read_text

LONGEST_YAML = 256 * 1024
"""Bytes of a recipe in YAML, which takes a second to parse; JSON may be larger."""
FIELDS: dict[str, Any] = {
    "width": int,
    "neurons": (int, list),
    "key_value_heads": int,
    "query_heads": int,
    "experts": int,
    "dropped_blocks": list,
    "tied": bool,
    "basis": str,
}
ALLOWED = "an eigenslice.json, or YAML (or JSON) with width, and optionally neurons (one number or one for each block "
ALLOWED += "that is kept), key_value_heads, query_heads, experts, dropped_blocks, tied and basis"


class _Plain(yaml.SafeLoader):
    """YAML without aliases, which can stand for gigabytes, and in which a field is said once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            _refuse("an alias", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            _refuse("a field is there twice", node)
        return values


def _refuse(problem: str, where: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe, each of its type; `width` is there.

    Raises:
        OptionsError: the file can't be read, or isn't a recipe.
    """
    try:
        content = _parsed(read_text(path, 16 * MIB))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {'nothing' if content is None else f'a {type(content).__name__}'}")
        recipe = content.get("plan", content)
        if not isinstance(recipe, dict):
            raise ValueError(f"its plan is of the type {type(recipe).__name__}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise OptionsError(
            f"--recipe {path} can't be read ({first_line(error)})", allowed=ALLOWED, next_step="check the file"
        ) from error
    wrong = [str(name)[:100] for name, value in recipe.items() if not _fits(name, value)]
    wrong += [] if "width" in recipe else ["width (missing)"]
    if wrong:
        raise wrong_recipe(path, wrong)
    return recipe


def wrong_recipe(path: Path, wrong: list[str]) -> OptionsError:
    """Return the error of a recipe with wrong fields, which are named in words."""
    return OptionsError(
        f"--recipe {path} has a wrong {', '.join(wrong)}", allowed=ALLOWED, next_step="correct the file"
    )


def _parsed(text: str) -> Any:
    """JSON's or YAML's value."""
    if text.lstrip().startswith("{"):
        try:
            return parsed_json(text, unique=True)
        except ValueError:  # YAML has such braces, too
            pass
    if len(text) > LONGEST_YAML:
        raise ValueError(f"it is no JSON, and as YAML it has more than {LONGEST_YAML:,} characters")
    return yaml.load(text, _Plain)  # made from SafeLoader


def _fits(name: Any, value: Any) -> bool:
    if name not in FIELDS or not isinstance(value, FIELDS[name]):
        return False
    if isinstance(value, list):
        return all(type(number) is int for number in value)
    return not isinstance(value, bool) or FIELDS[name] is bool
