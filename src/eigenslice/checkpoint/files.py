"""Files of a checkpoint, checked before anyone opens them: targets of links, and JSON of a bounded size."""

import re
import stat
from pathlib import Path
from typing import Any

from eigenslice.errors import CheckpointError, first_line
from eigenslice.runtime.reading import MIB, parsed_json

LARGEST_JSON = 64 * MIB
"""Largest size of configs and indexes in bytes. The index of a model with 150,000 tensors has 15 MiB."""
LARGEST_VOCABULARY = 512 * MIB
"""Largest size of a tokenizer in bytes."""
CACHED = re.compile(r".*/models--[^/]+/blobs/[^/]+|.*/blobs/[0-9a-f]{2}/[0-9a-f]{64}")
"""Folder of the files in a hub cache. The names in a snapshot's folder are links to these files."""
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: Path, folder: Path | None, largest: int | None = None) -> None:
    """Refuse anything but a regular file of a checkpoint that can be read. The file itself isn't read.

    Args:
        path: The file.
        folder: The checkpoint's folder. Links may lead to files in it, or in a hub cache; None allows any link.
        largest: Size in bytes that is allowed; None allows any.

    Raises:
        CheckpointError: it is something else, lies elsewhere, is too large or is closed to this user.
    """
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _unusable(path, f"can't be opened ({_reason(error)})") from error
    if folder is not None and not real.is_relative_to(folder.resolve()) and not CACHED.fullmatch(real.as_posix()):
        raise CheckpointError(
            f"{path} is a link to {real}, which is outside of the checkpoint's folder",
            allowed="files in the folder itself, and links within it or into a hub cache",
            next_step="copy the file into the folder",
        )
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for applies, name in KINDS if applies(status.st_mode)), "something else")
        raise _unusable(path, f"is {kind}, not a regular file")
    if largest is not None and status.st_size > largest:
        raise _unusable(path, f"has {status.st_size / MIB:.0f} MiB; files of its kind have at most {largest // MIB}")
    try:
        real.open("rb").close()
    except OSError as error:
        raise _unusable(path, f"can't be opened ({_reason(error)})") from error


def read_json(path: Path, folder: Path | None, allowed: str, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        folder: The checkpoint's folder, see `check_file`.
        allowed: Expected content of the file, for the message.
        largest: Largest allowed size in bytes.

    Raises:
        CheckpointError: `check_file` refuses the file, or it holds something else.
    """
    check_file(path, folder, largest)
    try:
        content = parsed_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _no_json(path, first_line(error), allowed) from error
    if not isinstance(content, dict):
        raise _no_json(path, f"it holds a {type(content).__name__}, not an object", allowed)
    return content


def _no_json(path: Path, why: str, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be read ({why})", allowed=allowed, next_step="download or save the checkpoint again"
    )


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {why}",
        allowed="regular files, as transformers saves them, that this user may read",
        next_step="check the file, or download or save the checkpoint again",
    )


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
