"""Recipe files: a plan, or one message."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenslice.errors import OptionsError
from eigenslice.plan.recipe import FIELDS, read_recipe
from tests.messages import check_message

ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\nwidth: 24\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width: 24", {"width": 24}),
        ('{"width": 24, "neurons": [1, 2]}', {"width": 24, "neurons": [1, 2]}),
        ("{width: 24, tied: false}", {"width": 24, "tied": False}),
        ('{"plan": {"width": 8, "basis": "global"}, "trials": [NaN]}', {"width": 8, "basis": "global"}),
    ],
)
def test_recipes(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r").write_text(text)
    assert read_recipe(tmp_path / "r") == expected


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it holds nothing"),
        (b"- 1", "it holds a list"),
        (b"plan: 3", "its plan is of the type int"),
        (b"width: [", "expected the node content"),
        (ALIASES.encode(), "an alias (line 2, column 8)"),
        (b"width: 24\nwidth: 16", "a field is there twice"),
        (b'{"width": 24, "width": 16}', "a field is there twice"),
        (b"[" * 3000, "RecursionError"),
        (b'{"a":' * 30000, "can't be read"),
        (b"width: 24\xff", "UnicodeDecodeError"),
        (b"width: " + b"9" * 5000, "ValueError"),
        (b"x" * 300_000, "more than 262,144 characters"),
        (b"!!python/object/apply:os.system [id]", "could not determine a constructor"),
        (b"width: true", "a wrong width"),
        (b"width: 24.0", "a wrong width"),
        (b"width: '24'", "a wrong width"),
        (b"width: .nan", "a wrong width"),
        (b"width: 2026-01-01", "a wrong width"),
        (b"width: 24\nneurons: [[1]]", "a wrong neurons"),
        (b"width: 24\nneurons: [true]", "a wrong neurons"),
        (b"width: 24\ntied: 1", "a wrong tied"),
        (b"width: 24\n1: 2", "a wrong 1"),
        (b"width: 24\nnull: 2", "a wrong None"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_what_is_no_recipe(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(OptionsError) as caught:
        read_recipe(tmp_path / "r")
    check_message(caught.value)
    assert found in caught.value.found
    assert str(caught.value).count("\n") == 2


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(OptionsError):
            read_recipe(path)


NUMBERS = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5)
VALUES = st.recursive(NUMBERS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))
FIELD_VALUES = st.dictionaries(st.sampled_from([*FIELDS, "plan", "x"]), VALUES, max_size=4)


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(FIELD_VALUES.map(json.dumps) | st.text("width: 24{}[]&*-\n\t'\"!%#|>?,", max_size=40) | st.binary(max_size=30))
def test_any_file_is_a_recipe_or_one_message(content: str | bytes) -> None:
    path = Path(tempfile.gettempdir()) / f"recipe-{os.getpid()}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        recipe = read_recipe(path)
    except OptionsError as error:
        check_message(error)
        return
    finally:
        path.unlink()
    assert type(recipe["width"]) is int
    assert set(recipe) <= set(FIELDS)
