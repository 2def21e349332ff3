"""The folder that a run works in, beside the output; the complete result takes the output's name.

`OUTPUT.partial` holds `run.json` (input and options of the run), `lock`, and the folders below. A run takes only an
empty folder or a folder of eigenslice, and removes only its own files.
"""

import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from eigenslice.errors import EigensliceError, IncompleteError, OutputError
from eigenslice.runtime.durable import flush, flush_all
from eigenslice.runtime.output import LOCK, RUN, WEIGHT_FILE, being_written, check_output, partial_path
from eigenslice.runtime.ranks import ALONE, Ranks, is_lasting
from eigenslice.runtime.run_file import check_same_input, check_same_run, is_same_run, read_run, write_run

STATE = re.compile(r"current\.json(\.new)?|[\w-]+\.safetensors|at-\d+-rank-\d+|settings\.json(\.new)?|checkpoint-\d+")


@dataclass(frozen=True)
class WorkFolder:
    """`OUTPUT.partial`.

    Attributes:
        path: The folder.
        names: Names that the result may have in it, beside the weight files'. None where no run has begun: then
            nothing but a lock is eigenslice's.
    """

    path: Path
    names: frozenset[str] | None

    @property
    def result(self) -> Path:
        """The file or folder that becomes the output; who writes it makes it."""
        return self.path / "result"

    @property
    def state(self) -> Path:
        """The folder that an interrupted run goes on from."""
        return self.path / "state"

    @property
    def began(self) -> bool:
        """True if there is anything to go on from."""
        return self.state.is_dir() and any(self.state.iterdir())

    @property
    def companions(self) -> Path:
        """Files that join the result in the end."""
        return self.path / "companions"

    @property
    def offload(self) -> Path:
        """Activations that are not held in memory."""
        return self.path / "offload"

    def foreign(self) -> list[str]:
        """Paths in this folder that eigenslice didn't make, relative to it."""
        paths = [path.relative_to(self.path) for path in self.path.rglob("*")]
        return sorted(str(path) for path in paths if not self._made(path))

    def remove(self) -> None:
        """Remove all that eigenslice made here but the lock, and keep the rest."""
        for path in sorted(self.path.rglob("*"), reverse=True):  # the content of a folder comes before the folder
            if path != self.path / LOCK and self._made(path.relative_to(self.path)):
                with suppress(OSError):  # a folder with something foreign in it
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def _made(self, relative: PurePath) -> bool:
        first, *rest = relative.parts
        path = self.path / relative
        if path.is_symlink():  # writing through it would change a file elsewhere
            return False
        if first in (LOCK, RUN, f"{RUN}.new"):
            return path.is_file()
        if self.names is None:
            return False
        if first in ("result", "companions"):
            return not rest or rest[0] in self.names or bool(WEIGHT_FILE.fullmatch(rest[0]))
        if first == "state":
            return not rest or bool(STATE.fullmatch(rest[0]))
        return first == "offload"


def check_work_folder(output: Path, resume: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output, as `check_output` does, or a work folder that isn't eigenslice's, before any work.

    Raises:
        OutputError.
    """
    check_output(output, resume, inputs)
    _refuse_foreign(partial_path(output))


@contextmanager
def work_folder(
    output: Path,
    identity: dict[str, Any],
    names: Collection[str] = (),
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[WorkFolder]:
    """Give the folder to work in; its `result` takes the name `output` when the body succeeds.

    When the body is interrupted or the disk is full, the folder stays if there is anything to go on from. After any
    other error of eigenslice's own it vanishes, unless this run goes on with an earlier one.

    Args:
        output: The file or folder that will be made.
        identity: Everything that the result depends on; every value is JSON.
        names: Names in the result, beside the weight files.
        resume: True to go on with an earlier run, if there is one.
        ranks: The processes. All get the folder; the first one makes it. On other machines, where the first one's
            folder can't be seen, a process makes one for the state and the activations of its machine.

    Raises:
        OptionsError: the folder was made from something else, or ranks have different inputs.
        OutputError: the folder can't be written, is somebody else's, or is in use by another process.
    """
    work = WorkFolder(partial_path(output), frozenset(names))
    with ExitStack() as owned:
        run = ranks.on_first(lambda: owned.enter_context(_owned(work, output, identity, resume)))

        def join() -> None:
            """Find the first rank's folder, or make one for this machine."""
            if ranks.first:
                return
            check_same_input(run["identity"], identity)
            if ranks.leads_node and not is_same_run(work.path, run["token"]):
                owned.enter_context(_owned(work, output, identity, resume, run["token"]))

        ranks.on_all(join)
        yield work


def remove_finished(output: Path) -> None:
    """Remove the work folder that a run left which was killed right after its result was complete."""
    path = partial_path(output)
    if not (path / LOCK).is_file():
        return
    with suppress(Timeout, EigensliceError, OSError), FileLock(path / LOCK, timeout=0):
        work = _as_it_was(path)
        if not work.foreign():
            _discard(work, [])


@contextmanager
def _owned(
    work: WorkFolder, output: Path, identity: dict[str, Any], resume: bool, token: str | None = None
) -> Iterator[dict[str, Any]]:
    """Give the work folder to the only process that writes, or to a machine's own state; see `work_folder`.

    Args:
        work: The folder.
        output: The file or folder that will be made.
        identity: Everything that the result depends on.
        resume: True to go on with an earlier run, if there is one.
        token: The token of the first rank's folder on another machine, where the result is written; None makes one.

    Yields:
        The token and the identity, for the other ranks.
    """
    check_work_folder(output, resume)
    created = [p for p in (work.path, *work.path.parents) if not p.exists()]
    lock = FileLock(work.path / LOCK)
    try:
        work.path.mkdir(parents=True, exist_ok=True)
        check_output(output, resume)  # with its parent there, the file system also judges its name
        lock.acquire(timeout=0)
    except Timeout as error:
        raise being_written(output) from error
    except (OSError, OutputError) as error:
        _remove_empty(created)
        raise (_failed(output, error) if isinstance(error, OSError) else error) from error
    earlier = (work.path / RUN).exists() and work.began
    try:
        known = token or uuid.uuid4().hex
        _begin(work, identity, earlier, known)
        yield {"token": known, "identity": identity}
        if token is None:
            _finish(work, output)
    except BaseException as error:
        if not earlier and (is_lasting(error) or not work.began):
            _discard(work, created)
        if isinstance(error, OSError):
            raise _failed(output, error, work) from error
        raise
    else:
        _discard(work, created)
    finally:
        lock.release()


def _refuse_foreign(path: Path) -> None:
    """Refuse a work folder that eigenslice didn't make, or that holds something else."""
    if not path.exists() and not path.is_symlink():
        return
    is_folder = path.is_dir() and not path.is_symlink()
    foreign = _as_it_was(path).foreign() if is_folder else [path.name]
    if foreign:
        raise OutputError(
            f"{path} is needed to work in, and holds what eigenslice didn't make: {', '.join(foreign[:3])}",
            allowed="no such folder, or one that an interrupted run left",
            next_step="move it away, or choose another --output",
        )


def _as_it_was(path: Path) -> WorkFolder:
    """A work folder as the run that made it left it.

    Raises:
        OutputError: `run.json` can't be read, or is somebody else's.
    """
    if not (path / RUN).exists():
        return WorkFolder(path, None)
    return WorkFolder(path, frozenset(map(str, read_run(path / RUN)["names"])))


def _begin(work: WorkFolder, identity: dict[str, Any], earlier: bool, token: str) -> None:
    """Write the identity of the run, or compare it with an earlier run's identity."""
    if earlier:
        check_same_run(work.path, identity)
    elif (work.path / RUN).exists():
        _as_it_was(work.path).remove()
    write_run(work.path / RUN, work.names or (), identity, token)
    for folder in (work.offload, work.companions):
        _clear(folder)
        folder.mkdir(exist_ok=True)
    work.state.mkdir(exist_ok=True)


def _clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def _finish(work: WorkFolder, output: Path) -> None:
    """Give the result the output's name, once all of it is on the disk."""
    foreign = [path for path in work.foreign() if path.startswith("result")]
    taken = output.exists() or output.is_symlink()
    if foreign or taken:
        raise IncompleteError(
            f"{work.path} holds what this run didn't make: {', '.join(foreign[:3])}"
            if foreign
            else f"{output} has come into being meanwhile",
            allowed="only the files of this run in its folder, and an output name that is free",
            next_step=f"move it away, then run the same command with --resume ({work.path} keeps the result)",
        )
    flush_all(work.result)
    _take_name(work.result, output)
    flush(output.absolute().parent)


def _take_name(result: Path, output: Path) -> None:
    """Rename a file or folder; unlike a rename alone, never replace a file that has come just now."""
    if result.is_file():
        try:
            os.link(result, output)
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
    result.rename(output)


def _discard(work: WorkFolder, created: list[Path]) -> None:
    """Remove the files of this run, and its empty folders."""
    with suppress(OSError):  # a read-only disk: the error that led here says more
        work.remove()
        (work.path / LOCK).unlink(missing_ok=True)
        _remove_empty(list(dict.fromkeys([work.path, *created])))


def _failed(output: Path, error: OSError, work: WorkFolder | None = None) -> OutputError:
    kept = work is not None and work.began
    again = f", then run the same command with --resume ({partial_path(output)} keeps what is done)" if kept else ""
    return (IncompleteError if kept else OutputError)(
        f"writing {output} failed: {error}",
        allowed="a folder with enough free space and the right to write",
        next_step=f"free space or choose another --output{again}",
    )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that are empty, the deepest first."""
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
