"""The description of an option, and the flag that an error names."""

from typing import Annotated

import pytest
from pydantic import ValidationError

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.evaluation import PerplexityOptions
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.options.flags import SIZE, Option, Options, Range, described, flag_at, flag_of, nested_of, type_of
from eigenslice.options.slicing import SliceOptions
from tests.cli.conftest import Failure, command, fails  # noqa: F401


def test_a_field_is_described_once() -> None:
    class Sizes(Options):
        """Sizes."""

        width: Annotated[int | None, Option("Width.", SIZE, "all"), Range(1, 9, "1 to 9")] = None

    assert described(Sizes, "width", Option) == Option("Width.", SIZE, "all")
    assert described(Sizes, "width", Range) == Range(1, 9, "1 to 9")
    assert type_of(Sizes, "width") == int | None
    assert (Sizes(width=9).width, Sizes().width) == (9, None)


def test_flags_have_the_fields_names_or_their_own() -> None:
    assert flag_of(SliceOptions, "random_tokens") == "--random-tokens"
    assert flag_of(SliceOptions, "shard_gib") == "--shard-size"
    assert flag_of(SliceOptions, "of_an_older_version") == "--of-an-older-version"
    assert (nested_of(SliceOptions), nested_of(FinetuneOptions), nested_of(CalibrationOptions)) == (
        "calibration",
        "data",
        None,
    )


def test_places_in_errors_are_flags() -> None:
    assert flag_at("SliceOptions", ("width",)) == "--width"
    assert flag_at("SliceOptions", ("calibration", "data", "str")) == "--calibration"
    assert flag_at("CalibrationOptions", ("data", "tuple[str, ...]", 0)) == "--calibration"
    assert flag_at("PerplexityOptions", ("text", "data")) == "--data"
    assert flag_at("NoOptions", ("width",)) is None


@pytest.mark.parametrize(
    ("kind", "values", "flag"),
    [
        (SliceOptions, {"model": "m", "output": "o", "width": "x"}, "--width"),
        (SliceOptions, {"model": "m", "output": "o", "calibration": {"data": 3}}, "--calibration"),
        (FinetuneOptions, {"model": "m", "output": "o", "shard_gib": "x"}, "--shard-size"),
        (PerplexityOptions, {"text": {"samples": "x"}}, "--samples"),
    ],
)
def test_the_flag_of_an_error(kind: type[Options], values: dict[str, object], flag: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**values)
    assert flag_at(caught.value.title, caught.value.errors()[0]["loc"]) == flag


def test_numbers_out_of_range_name_the_flag(fails: Failure) -> None:  # noqa: F811
    assert "--seqlen 1" in fails("slice", "m", "-o", "o", "--width", 8, "--seqlen", 1)
    assert "--distill 2.0" in fails("finetune", "m", "-o", "o", "--teacher", "t", "--distill", 2)
