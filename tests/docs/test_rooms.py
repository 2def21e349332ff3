"""ARCHITECTURE.md has one line for each room, in the order of imports."""

import re
import tomllib

from tests.docs.markdown import ROOT, spans

SOURCE = ROOT / "src/eigenslice"


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
