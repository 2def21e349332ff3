"""`run.json` of a work folder: what the run was begun with, and the names that its result may hold."""

import json
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from eigenslice.errors import OptionsError, OutputError
from eigenslice.runtime.durable import replace_json
from eigenslice.runtime.output import RUN, refuse_live

MARK = "eigenslice work folder"
DELAY = 60
"""Seconds that a rank waits for the first one's `run.json` in a folder that somebody has locked."""


def write_run(path: Path, names: Collection[str], identity: dict[str, Any], token: str) -> None:
    """Write `run.json`.

    Args:
        path: The file.
        names: Names in the result, beside the weight files.
        identity: Everything that the result depends on; every value is JSON.
        token: A name for these processes, by which they know their folder.
    """
    replace_json(path, {"made by": MARK, "names": sorted(names), "token": token, "run": identity})


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


def check_same_input(first: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse a rank that reads something else than the first one. Their options may have other paths in them.

    Raises:
        OptionsError: it does.
    """
    options = {"option", "finetune"}
    before, now = ({name: value for name, value in run.items() if name not in options} for run in (first, own))
    different = sorted(differences(before, json.loads(json.dumps(now))))
    if different:
        raise OptionsError(
            "a rank reads something else than the first one: " + "; ".join(different),
            allowed="the same checkpoint, texts and version for all ranks",
            next_step="copy them from the first rank's machine",
        )


def is_same_run(folder: Path, token: str) -> bool:
    """Return whether a work folder was made by the first rank. A network file system may show it with a delay.

    Args:
        folder: The work folder.
        token: The first rank's token.
    """
    for _ in range(DELAY):
        with suppress(OutputError):
            if (folder / RUN).exists() and read_run(folder / RUN).get("token") == token:
                return True
        try:
            refuse_live(folder, folder)
        except OutputError:  # a run is at work in it: maybe this one
            time.sleep(1)
        else:
            return False
    return False


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Return the differences of two JSON values, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {before}, is {now}"
