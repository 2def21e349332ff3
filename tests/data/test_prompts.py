"""Prompts: the built-in ones, lines of plain text, records, and what they are cut to."""

import json
from pathlib import Path

import pytest

from eigenslice.data.prompts import EVERYDAY, load_prompts
from eigenslice.errors import CalibrationError, EigensliceWarning
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.generating import PROMPT_TEXTS
from eigenslice.options.reporting import PROMPTS


def test_the_built_in_prompts_are_the_reports_and_more() -> None:
    prompts = load_prompts(CalibrationOptions(data="builtin"), 100)
    assert prompts == list(EVERYDAY)
    assert prompts[: len(PROMPTS)] == list(PROMPTS)
    assert len(set(prompts)) == len(prompts)
    option = PROMPT_TEXTS["data"]
    assert option is not None
    assert f"({len(prompts)} everyday beginnings)" in option.help


def test_each_line_of_a_text_and_each_record_is_a_prompt(tmp_path: Path) -> None:
    plain, records = tmp_path / "plain.txt", tmp_path / "records.jsonl"
    plain.write_text("The cat \n\n  sat on\nthe mat\n")
    rows = [{"text": "one\ntwo", "goal": "x"}, {"text": " three ", "goal": "y"}]
    records.write_text("\n".join(map(json.dumps, rows)))
    assert load_prompts(CalibrationOptions(data=str(plain)), 9) == ["The cat", "sat on", "the mat"]
    both = CalibrationOptions(data=(str(plain), str(records)))
    assert load_prompts(both, 2) == ["The cat", "sat on", "one\ntwo", "three"]
    goals = CalibrationOptions(data=(str(plain), str(records)), field=("", "goal"))
    assert load_prompts(goals, 9) == ["The cat", "sat on", "the mat", "x", "y"]


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(CalibrationError, match="no text"):
        load_prompts(CalibrationOptions(data=str(tmp_path / "blank.txt")), 9)
    with pytest.raises(CalibrationError, match="doesn't exist"):
        load_prompts(CalibrationOptions(data=str(tmp_path / "none.txt")), 9)
    (tmp_path / "odd.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.warns(EigensliceWarning, match="read as plain text"):
        assert load_prompts(CalibrationOptions(data=str(tmp_path / "odd.txt")), 9) == ['{"text": "a"}', '{"text": "b"}']
