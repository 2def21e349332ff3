"""`run.json` of a work folder: what the run was begun with, and the names that its result may hold."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from eigenslice.errors import OptionsError, OutputError
from eigenslice.runtime.durable import replace_json
from eigenslice.runtime.output import RUN

MARK = "eigenslice work folder"


def write_run(path: Path, names: Collection[str], identity: dict[str, Any]) -> None:
    """Write `run.json`.

    Args:
        path: The file.
        names: Names in the result, beside the weight files.
        identity: Everything that the result depends on; every value is JSON.
    """
    replace_json(path, {"made by": MARK, "names": sorted(names), "run": identity})


def read_run(path: Path) -> dict[str, Any]:
    """Return the content of `run.json`.

    Raises:
        OutputError: the file can't be read, or is somebody else's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made by"] == MARK and isinstance(content["names"], list) and isinstance(content["run"], dict):
            return content
        reason = "it was written by something else"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = type(error).__name__
    raise OutputError(
        f"{path} can't be read ({reason})",
        allowed="the file as eigenslice wrote it",
        next_step=f"move {path.parent} away, and start anew",
    )


def check_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on in a work folder that was begun with something else.

    Raises:
        OptionsError: an option, the input or the version is another one.
        OutputError: `run.json` can't be read, or is somebody else's.
    """
    now = json.loads(json.dumps(identity))
    different = sorted(differences(read_run(folder / RUN)["run"], now))
    if different:
        raise OptionsError(
            f"{folder} was begun with something else: " + "; ".join(different),
            allowed="--resume with the options, input and version that the run was begun with",
            next_step="run it as it was begun, or remove that folder to start anew",
        )


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Return the differences of two JSON values, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {before}, is {now}"
