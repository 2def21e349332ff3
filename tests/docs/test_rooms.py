"""ARCHITECTURE.md has one line for each room, and no others."""

import re

from tests.docs.markdown import ROOT, spans

SOURCE = ROOT / "src/eigenslice"


def test_every_room_has_a_line() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page[page.index("## Rooms") : page.index("## One check of a checkpoint")]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)/`", cell)]
    rooms = {path.parent.name for path in SOURCE.glob("*/*.py")}
    assert sorted(named) == sorted(rooms)


def test_files_of_rooms_exist() -> None:
    files = [span for span in spans(ROOT / "ARCHITECTURE.md") if re.fullmatch(r"[a-z]\w*/\w+\.py", span)]
    files = [file for file in files if not file.startswith(("tests/", "benchmarks/"))]
    assert len(files) > 3
    assert [file for file in files if not (SOURCE / file).exists()] == []
