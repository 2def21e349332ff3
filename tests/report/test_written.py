"""The figures of written text on the report's page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eigenslice.errors import OptionsError
from eigenslice.report import ReportOptions, report
from eigenslice.report.json_inputs import read_input
from eigenslice.report.written import written_rows
from tests.conftest import Slicer
from tests.json_changes import changed, places
from tests.messages import check_message

BROKEN: list[Any] = [math.nan, math.inf, None, "x", [], {}, -1, 0, 10**400, ..., "</td><script>alert(1)</script>"]


def content() -> dict[str, Any]:
    """What `eval --generate --json` prints, with made-up numbers."""
    rows: list[dict[str, Any]] = [
        {
            "model": f"models/{name}",
            "greedy": {"tokens": 90, "repeated": repeated},
            "sampled": {"tokens": 80, "repeated": None, "dense_perplexity": perplexity},
            "agreement": None,
            "texts": [{"prompt": "a", "greedy": "b", "sampled": "c"}],
        }
        for name, repeated, perplexity in (("dense", 0.125, 8.0), ("small", 0.5, 20.0))
    ]
    rows[1]["agreement"] = {"mean": 7.25, "median": 5.0}
    return {"settings": {"new": 30}, "prompts": 3, "models": rows}


def test_the_table_is_on_the_page(run_slice: Slicer, tmp_path: Path) -> None:
    sliced, path = run_slice("llama", width=24).output, tmp_path / "writing.json"
    path.write_text(json.dumps(content()))
    text = report(ReportOptions(folder=sliced, writing=path)).read_text(encoding="utf-8")
    assert "<tr><th></th><th>dense</th><th>small</th></tr>" in text
    assert "<td>repeated 4-grams, greedy text</td><td>12.5 %</td><td>50.0 %</td>" in text
    assert "<td>repeated 4-grams, sampled text</td><td></td><td></td>" in text
    assert "<td>8.00</td><td>20.00 (x2.500)</td>" in text
    assert "mean</td><td></td><td>7.2</td>" in text
    assert "median</td><td></td><td>5.0</td>" in text
    assert "3 prompts, up to 30 tokens after each." in text
    assert "The most likely continuation" not in text
    assert "What they write" not in report(ReportOptions(folder=sliced)).read_text(encoding="utf-8")


def test_any_json_is_shown_or_refused(tmp_path: Path) -> None:
    """One value after the other is replaced."""
    path, shown = tmp_path / "writing.json", 0
    for place in [place for place in places(content()) if place]:
        for value in BROKEN:
            path.write_text(json.dumps(changed(content(), place, value)))
            try:
                found = read_input("writing", path)
            except OptionsError as error:
                check_message(error, f"--writing {path}")
                continue
            assert [len(cells) for _, cells in written_rows(found)] == [len(found["models"])] * 5
            assert "inf" not in str(list(written_rows(found)))
            shown += 1
    assert shown >= 10


@pytest.mark.parametrize("wrong", [b"", b"{}", b"null", b'{"models": [{}]}'])
def test_files_that_hold_no_figures(wrong: bytes, run_slice: Slicer, tmp_path: Path) -> None:
    sliced = run_slice("llama", width=24).output
    (tmp_path / "x.json").write_bytes(wrong)
    with pytest.raises(OptionsError, match="--writing"):
        report(ReportOptions(folder=sliced, writing=tmp_path / "x.json"))
    assert not list(tmp_path.glob("*.html"))
