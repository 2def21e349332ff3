"""The folder that a run works in, beside the output; it takes the output's name when the result is complete."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eigenslice.checkpoint.writer import write_json
from eigenslice.errors import EigensliceError, IncompleteError, OptionsError, OutputError, RankError
from eigenslice.ranks import ALONE, Ranks

RUN = "run.json"
LONGEST_NAME = 200  # bytes of a name that ".partial" is put behind; file systems take 255


@dataclass(frozen=True)
class WorkFolder:
    """`OUTPUT.partial`.

    Attributes:
        path: The folder; it holds `run.json`, which says what is being made from what.
    """

    path: Path

    @property
    def result(self) -> Path:
        """What will be the output."""
        return self.path / "result"

    @property
    def state(self) -> Path:
        """What the run goes on from."""
        return self.path / "state"

    @property
    def began(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.state.iterdir()) if self.state.exists() else False

    @property
    def offload(self) -> Path:
        """Activations that are not held in memory."""
        return self.path / "offload"


def partial_path(output: Path) -> Path:
    """Where a run works whose result will be called `output`."""
    name = output.name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return output.absolute().parent / f"{name}.partial"


def check_output(output: Path, resume: bool = False) -> None:
    """Refuse an output folder that exists, whose parent isn't a folder, or that an interrupted run is making.

    Args:
        output: The folder that will be made.
        resume: Whether to go on with an interrupted run.

    Raises:
        OutputError.
    """
    try:
        exists = output.exists()
        left = (partial_path(output) / RUN).exists()
    except OSError as error:
        raise _impossible_name(output, error) from error
    if exists:
        raise OutputError(
            f"{output} exists already",
            allowed="a name that is free: eigenslice never writes into an existing folder",
            next_step="choose another --output, or remove this one",
        )
    if left and not resume:
        raise OutputError(
            f"{partial_path(output)} holds an interrupted run",
            allowed="--resume to go on with it, or another --output",
            next_step="add --resume, or remove that folder to start anew",
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(
            f"{parent} is not a folder",
            allowed="an output path below a folder",
            next_step="choose another --output",
        )


def _impossible_name(output: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{output} can't be a folder ({error.strerror})",
        allowed="a name that the file system takes",
        next_step="choose another --output",
    )


@contextmanager
def work_folder(output: Path, identity: dict[str, Any], resume: bool, ranks: Ranks = ALONE) -> Iterator[WorkFolder]:
    """Give the folder to work in; what is in its `result` takes the name `output` when the body succeeds.

    When the body is interrupted or the disk is full, the folder stays if there is anything to go on from; after any
    other error of eigenslice's own it vanishes, and so do the parents that were made for it.

    Args:
        output: The folder that will be made.
        identity: What the run depends on; every value is JSON.
        resume: Go on with what is there, if it is there.
        ranks: All get the folder; the first one makes it.

    Raises:
        OptionsError: what is there was made from something else.
        OutputError: it can't be written, or another process is at it.
    """
    work = WorkFolder(partial_path(output))
    with ExitStack() as owned:
        ranks.on_first(lambda: owned.enter_context(_owned(work, output, identity, resume)))
        yield work


@contextmanager
def _owned(work: WorkFolder, output: Path, identity: dict[str, Any], resume: bool) -> Iterator[None]:
    """As `work_folder`, for the one process that writes."""
    check_output(output, resume)
    created = [p for p in (work.path.parent, *work.path.parent.parents) if not p.exists()]
    try:
        work.path.mkdir(parents=True, exist_ok=True)
        check_output(output, resume)  # with its parent there, the file system also judges its name
    except (OSError, OutputError) as error:
        _remove([work.path, *created])
        raise (_failed(output, error) if isinstance(error, OSError) else error) from error
    begun = False
    lock = FileLock(work.path / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"another process is writing {output}",
            allowed="one process for each output",
            next_step="wait for it, or choose another --output",
        ) from error
    try:
        _check_identity(work.path / RUN, identity)
        shutil.rmtree(work.offload, ignore_errors=True)
        begun = True
        for folder in (work.result, work.state, work.offload):
            folder.mkdir(exist_ok=True)
        yield
        if output.exists():
            raise IncompleteError(
                f"{output} has come into being meanwhile",
                allowed="a name that is free",
                next_step=f"move it away, then run the same command with --resume ({work.path} keeps the result)",
            )
        work.result.rename(output)
    except BaseException as error:
        lasting = isinstance(error, EigensliceError) and not isinstance(error, IncompleteError | RankError)
        if begun and (lasting or not work.began):
            shutil.rmtree(work.path, ignore_errors=True)
            _remove(created)
        if isinstance(error, OSError):
            raise _failed(output, error, work) from error
        raise
    else:
        shutil.rmtree(work.path, ignore_errors=True)
    finally:
        lock.release()


def _failed(output: Path, error: OSError, work: WorkFolder | None = None) -> OutputError:
    kept = work is not None and work.began
    again = f", then run the same command with --resume ({partial_path(output)} keeps what is done)" if kept else ""
    return (IncompleteError if kept else OutputError)(
        f"writing {output} failed: {error}",
        allowed="a folder with enough free space and the right to write",
        next_step=f"free space or choose another --output{again}",
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all; one that is there is replaced.

    Raises:
        OutputError: it can't be written.
    """
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.absolute().parent, prefix=f".{path.name[:40]}-", encoding="utf-8", delete=False
        ) as file:
            temporary = Path(file.name)
            try:
                file.write(text)
                file.close()
                temporary.chmod(0o644)
                temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(
            f"writing {path} failed: {error}",
            allowed="a folder with enough free space and the right to write",
            next_step="free space or choose another --output",
        ) from error


def _remove(folders: list[Path]) -> None:
    """Remove folders that are empty, the deepest first."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Write what the run depends on, or compare it with what is there."""
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        beside = path.with_suffix(".new")
        write_json(beside, identity)
        beside.replace(path)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(differences(found, identity))
    if different:
        raise OptionsError(
            f"{path.parent} was begun with something else: " + "; ".join(different),
            allowed="--resume with the options, input and version that the run was begun with",
            next_step="run it as it was begun, or remove that folder to start anew",
        )


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {before}, is {now}"
