"""Checks of a result's path: a free name, away from all input."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from eigenslice.errors import OutputError
from eigenslice.options.paths import expanded

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

LOCK = "lock"
RUN = "run.json"
LONGEST_NAME = 200
"""Bytes of a name that ".partial" is put behind; file systems take 255."""


def partial_path(output: Path) -> Path:
    """Return the work folder of a run with the result `output`."""
    name = output.name
    if len(name.encode()) > LONGEST_NAME:  # two long names stay two names
        short = name.encode()[: LONGEST_NAME - 17].decode(errors="ignore")
        name = f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return output.absolute().parent / f"{name}.partial"


def unhealed_path(output: Path) -> Path:
    """Return the folder of the sliced model while it is healed into `output`."""
    return partial_path(output).with_suffix(".unhealed")


def check_output(output: Path, resume: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that can't become a new file or folder, before any work.

    Args:
        output: The file or folder that will be made.
        resume: True to go on with an interrupted run.
        inputs: Files and folders that are read, see `refuse_overlap`.

    Raises:
        OutputError: the name is taken or impossible, another process or an interrupted run is writing it, its parent
            can't be written to, or it touches an input.
    """
    try:
        if "\0" in str(output):
            raise ValueError("it has a null character")
        exists = output.exists() or output.is_symlink()
        if exists or output.name in ("", ".", ".."):
            raise OutputError(
                f"{output} exists already" + ("" if output.exists() else ", as a symbolic link that leads nowhere"),
                allowed="a name that is free: eigenslice never writes into an existing folder",
                next_step="choose another --output, or remove this one",
            )
        refuse_overlap(output, inputs)
        partial = partial_path(output)
        refuse_live(partial, output)
        left = (partial / RUN).exists() and _holds_state(partial)
        _check_parent(output)
    except (OSError, ValueError) as error:
        raise _impossible_name(output, error) from error
    if left and not resume:
        raise OutputError(
            f"{partial} holds an interrupted run",
            allowed="--resume to go on with it, or another --output",
            next_step="add --resume, or remove that folder to start anew",
        )


def refuse_overlap(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output, or its work folder, that is an input, lies inside one or holds one.

    Args:
        output: The file or folder that will be made.
        inputs: Files and folders that are read; links are followed. Missing files are left out.

    Raises:
        OutputError: the output touches an input.
    """
    for path in map(expanded, inputs):
        if not path.exists():
            continue
        for ours in (output, partial_path(output)):
            if _is_within(ours, path) or _is_within(path, ours):
                raise OutputError(
                    f"{ours} and the input {path} are in one another",
                    allowed=f"an output outside of the input, and no input in {partial_path(output).name}: the input "
                    "is never written to",
                    next_step="choose another --output",
                )


def _is_within(inner: Path, outer: Path) -> bool:
    """Return whether a path is another path, or lies below it, with links followed."""
    inner, outer = inner.resolve(), outer.resolve()
    if inner.is_relative_to(outer):
        return True
    # A folder can have two names: bind mounts, file systems that ignore case
    return outer.exists() and any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents))


def refuse_live(partial: Path, output: Path) -> None:
    """Refuse an output that another process is writing at this moment.

    Args:
        partial: The work folder, which may not exist.
        output: The output that the work folder will become.

    Raises:
        OutputError: another process is writing it.
    """
    lock = partial / LOCK
    if partial.is_symlink() or lock.is_symlink() or not lock.is_file():
        return
    try:
        with FileLock(lock, timeout=0):
            pass
    except Timeout as error:
        raise being_written(output) from error


def being_written(output: Path) -> OutputError:
    """The error of a second process at one output."""
    return OutputError(
        f"another process is writing {output}",
        allowed="one process for each output",
        next_step="wait for it, or choose another --output",
    )


def _holds_state(partial: Path) -> bool:
    state = partial / "state"
    return state.is_dir() and any(state.iterdir())


def _check_parent(output: Path) -> None:
    """Refuse a parent that is no folder, leads nowhere or can't be written to."""
    parent = output.absolute().parent
    while not parent.exists() and not parent.is_symlink():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(
            f"{parent} is not a folder" + (": the symbolic link leads nowhere" if parent.is_symlink() else ""),
            allowed="an output path below a folder",
            next_step="choose another --output",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{parent} can't be written to",
            allowed="an output path below a folder with the right to write",
            next_step="choose another --output, or change the folder's permissions",
        )


def _impossible_name(output: Path, error: OSError | ValueError) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return OutputError(
        f"{str(output)!r} can't be written ({reason})",
        allowed="a name that the file system takes",
        next_step="choose another --output",
    )
