"""ARCHITECTURE.md has one line for each room, and no others."""

import re

from tests.docs.markdown import ROOT

SOURCE = ROOT / "src/eigenslice"


def test_every_room_has_a_line() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page[page.index("## Rooms") : page.index("## One check of a checkpoint")]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)/`", cell)]
    rooms = {path.parent.name for path in SOURCE.glob("*/*.py")}
    assert sorted(named) == sorted(rooms)
