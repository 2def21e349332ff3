"""All that is on a disk, to see what an attack has changed."""

import os
import stat
from collections.abc import Collection
from pathlib import Path

Snapshot = dict[str, object]


def snapshot(folder: Path, without: Collection[str] = ()) -> Snapshot:
    """Content of each file, target of each link and mode of each folder below a folder, by path.

    Args:
        folder: The folder.
        without: Paths relative to it that are left out, with everything below.
    """
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(name == out or name.startswith(f"{out}{os.sep}") for out in without):
            continue
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = ("link", str(path.readlink()))
        else:
            found[name] = (oct(mode), path.read_bytes() if stat.S_ISREG(mode) else None)
    return found


def flip(path: Path, at: float) -> None:
    """Flip one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(at * len(content)))] ^= 1 << 3
    path.write_bytes(content)
