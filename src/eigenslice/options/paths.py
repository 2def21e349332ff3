"""Paths that the user gives."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from eigenslice.errors import OptionsError


def expanded(path: Path | str) -> Path:
    """A path in which ~ and ~user stand for a home folder; the shell leaves them in quotes, and Python's callers do.

    Raises:
        OptionsError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionsError(
            f"{path}: there is no user {Path(path).parts[0].removeprefix('~') or 'with a home folder'}",
            allowed="~ for your own home folder, ~NAME for another user's, or a path without ~",
            next_step="write the whole path, from / on; a folder here whose name begins with ~, too",
        ) from error


UserPath = Annotated[Path, AfterValidator(expanded)]
"""Type of options that are paths."""
