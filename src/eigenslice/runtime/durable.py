"""Writing that survives a kill or a power cut: data reach the disk before their name does."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eigenslice.errors import OutputError

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
WINDOWS = os.name == "nt"


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk. Raises OSError."""
    if WINDOWS and path.is_dir():  # Windows opens no folders, and writes names by itself
        return
    descriptor = os.open(path, (os.O_RDWR if WINDOWS else os.O_RDONLY) | NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(path: Path) -> None:
    """Flush a file, or a folder and everything in it. Raises OSError."""
    for inner in sorted(path.rglob("*"), reverse=True) if path.is_dir() else ():
        flush(inner)
    flush(path)


def replace(source: Path, target: Path) -> None:
    """Give a file the name of another one, in one step, after its content has reached the disk. Raises OSError."""
    flush(source)
    source.replace(target)
    flush(target.parent)


def replace_json(path: Path, content: Any) -> None:
    """Write a JSON file, which is the old one or the new one at every moment. Raises OSError."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    replace(beside, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all; a file that is there is replaced.

    A process that is killed while it writes leaves `.NAME.eigenslice-new`, which the next one replaces.

    Raises:
        OutputError: the file can't be written, or another process is writing it.
    """
    beside = path.absolute().with_name(f".{path.name.encode()[:200].decode(errors='ignore')}.eigenslice-new")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(beside, timeout=0):
            beside.write_text(text, encoding="utf-8")  # the lock has seen that it is no link
            beside.chmod(0o644)
            replace(beside, path.absolute())
    except OSError as error:
        if isinstance(error, Timeout) and beside.exists():
            raise OutputError(
                f"another process is writing {path}",
                allowed="one process for each output",
                next_step="wait for it, or choose another --output",
            ) from error
        beside.unlink(missing_ok=True)
        raise OutputError(
            f"writing {path} failed: {error}",
            allowed="a folder with enough free space and the right to write",
            next_step="free space or choose another --output",
        ) from error


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    digests = {}
    for file in files:
        with file.open("rb") as handle:
            digests[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests
