"""Messages of three lines, and the line of another library's error that tells the cause."""

from typing import Any

import pytest
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError
from pydantic import BaseModel, ValidationError

from eigenslice.errors import LONGEST_LINE, LONGEST_PART, EigensliceError, first_line, printable, shortened


class Numbers(BaseModel):
    """Something to be wrong."""

    width: int


def raised(kind: type[Exception], work: Any, *arguments: Any) -> Exception:
    with pytest.raises(kind) as caught:
        work(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "ValueError: plain"),
        ("", "ValueError"),
        ("  \n\n ---\n reason \nmore", "ValueError: reason"),
        ("Class validation error for validator 'x':\n    ValueError: too wide", "ValueError: ValueError: too wide"),
        ("Error(s) in loading state_dict for X:\n\tsize mismatch", "ValueError: size mismatch"),
        ("all of it:", "ValueError: all of it:"),
        ("\x1b[31mred\x1b[0m and \x1b]8;;http://x\x07link\x1b]8;;\x07", "ValueError: red and link"),
        ("a\tb\x00c\u202ed\udcff", "ValueError: a\\tb\\x00c\\u202ed\\udcff"),
        ("boom\nTraceback (most recent call last):\n  File x\nKeyError: 'y'", "ValueError: KeyError: 'y'"),
    ],
)
def test_the_line_that_tells_the_cause(text: str, expected: str) -> None:
    assert first_line(ValueError(text)) == expected


def test_errors_of_libraries_that_begin_with_a_heading() -> None:
    strict = StrictDataclassClassValidationError("validate_architecture", ValueError("The hidden size (7) is odd"))
    assert first_line(strict).endswith(": The hidden size (7) is odd")
    invalid = raised(ValidationError, Numbers.model_validate, {"width": "x"})
    assert "width: Input should be a valid integer" in first_line(invalid)
    found = first_line(raised(yaml.YAMLError, yaml.safe_load, "width: ["))
    assert found == "ParserError: expected the node content, but found '<stream end>' (line 1, column 9)"


def test_an_error_that_only_wraps_another() -> None:
    wrapper = type("DatasetGenerationError", (Exception,), {})("An error occurred while generating the dataset")
    wrapper.__cause__ = KeyError("text")
    assert first_line(wrapper) == "KeyError: 'text'"


def test_an_error_whose_text_can_not_be_made() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert first_line(BrokenError()) == "BrokenError"


def test_long_reasons_are_cut_in_their_middle() -> None:
    found = first_line(ValueError("begin " + "x" * 10**6 + " end"))
    assert len(found) <= LONGEST_LINE + len("ValueError: ")
    assert found.startswith("ValueError: begin ")
    assert shortened("abcdefghij" * 3, 25) == "abcdefghij ... abcdefghij"


def test_a_message_has_three_lines_whatever_it_names() -> None:
    error = EigensliceError("a\nb\x1b[2J" + "c" * 10**5, allowed="x\r\ny", next_step="z\u2028")
    lines = str(error).split("\n")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["allowed", "next"]
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith(r"a\nb\x1b[2Jccc")
    assert len(lines[0]) < 2 * LONGEST_PART
    assert (error.allowed, error.next_step) == (r"x\r\ny", r"z\u2028")


def test_names_in_all_languages_stay_as_they_are() -> None:
    name = "Übung/модель/模型/ 😀|`<x>"
    assert printable(name) == name
