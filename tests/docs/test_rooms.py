"""ARCHITECTURE.md has one line for each room, in the order of imports; files have names of their own."""

import re
import tomllib
from collections import Counter

import pytest

from tests.docs.markdown import ROOT, spans

SOURCE = ROOT / "src/eigenslice"
VERBS = {"inspect.py", "slice.py"}
"""Names of files in `cli/` and in the room of the verb's algorithm."""


def test_rooms_stand_in_the_order_of_imports() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page[page.index("## Rooms") : page.index("## One check of a checkpoint")]
    named = re.findall(r"^\| `(\w+)/`", section, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    rooms = {path.parent.name for path in SOURCE.glob("*/*.py")}
    assert named == [layer for layer in contract["layers"] if layer in rooms]
    assert set(named) == rooms


def test_files_of_rooms_exist() -> None:
    files = [span for span in spans(ROOT / "ARCHITECTURE.md") if re.fullmatch(r"[a-z]\w*/\w+\.py", span)]
    files = [file for file in files if not file.startswith(("tests/", "benchmarks/"))]
    assert len(files) > 3
    assert [file for file in files if not (SOURCE / file).exists()] == []


@pytest.mark.parametrize("folder", ["src/eigenslice", "tests"])
def test_no_two_files_share_a_name(folder: str) -> None:
    names = Counter(path.name for path in (ROOT / folder).rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} - {"__init__.py", "conftest.py"} - VERBS == set()
    assert sum(names.values()) > 100
