"""The saved state of a run, in files, from which an interrupted run goes on."""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eigenslice.errors import EigensliceWarning
from eigenslice.runtime.durable import file_hashes, flush_all, replace_json
from eigenslice.runtime.offload import OffloadedTensors, save_tensors
from eigenslice.runtime.ranks import Ranks

CURRENT = "current.json"
SHARE = 0.02
"""Share of the time that saving may take: where blocks take milliseconds, not every one is saved."""


@dataclass(frozen=True)
class Position:
    """The position of a stage when its state was saved, before the first site of a block.

    Attributes:
        block: Number of the block.
        tensors: Sums and decisions of the stage.
        content: Sums and decisions that are numbers or text; every value is JSON.
        folder: The folder of the activations.
    """

    block: int
    tensors: dict[str, Tensor]
    content: dict[str, Any]
    folder: Path

    def restore(self, name: str, tensors: OffloadedTensors) -> None:
        """Put activations back that were saved under a name."""
        tensors.restore(self.folder / name)


@dataclass
class RunState:
    """The saved state of a run: the results of finished stages, and one position in the stage under way.

    A state is on the disk before `current.json` names it, and this file is replaced in one step. It holds the SHA-256
    of all files that it names. If a file has changed, its stage begins anew. Ranks on other machines have folders of
    their own: there are only the positions of these ranks, and all else is the first rank's.

    Attributes:
        folder: The folder of the files.
        ranks: The processes; each rank saves its own tensors.
    """

    folder: Path
    ranks: Ranks
    _current: dict[str, Any] = field(default_factory=lambda: {"serial": 0, "finished": {}, "at": None})
    _earliest: float = 0.0

    def __post_init__(self) -> None:
        current = self.ranks.on_first(self._read)
        if current is not None:
            self._current = current

    def result(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the result of a stage, if it is finished."""
        finished = self._current["finished"].get(stage)
        if finished is None:
            return None
        path = self._file_of(stage)
        if not self.ranks.on_first(lambda: path.is_file() and _sha256(path) == finished["sha256"]):
            del self._current["finished"][stage]
            self._warn(path, stage)
            return None
        return self.ranks.share(load_file(path) if self.ranks.first else {}), finished["content"]

    def finish(self, stage: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Save the result of a stage, the same on all ranks, and forget its position."""

        def keep() -> dict[str, Any]:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, self._file_of(stage))
            flush_all(self._file_of(stage))
            result = {"sha256": _sha256(self._file_of(stage)), "content": dict(content)}
            return self._commit(None, self._current["finished"] | {stage: result})

        before = self._current["serial"]
        self._current = self.ranks.on_first(keep)
        shutil.rmtree(self._folder_of(before), ignore_errors=True)
        self._earliest = 0.0

    def position(self, stage: str) -> Position | None:
        """Return the position of a stage, if it is the interrupted one."""
        at = self._current["at"]
        if at is None or at["stage"] != stage:
            return None
        folder = self._folder_of(self._current["serial"])
        if self._digests(folder) != at["digests"]:
            self.forget(stage, folder)
            return None
        return Position(at["block"], load_file(folder / "tensors.safetensors"), at["content"], folder)

    def forget(self, stage: str, changed: Path) -> None:
        """Let a stage begin anew, since a file of its state isn't as it was written."""
        self._current["at"] = None
        self._warn(changed, stage)

    def save(
        self,
        stage: str,
        block: int,
        activations: Mapping[str, OffloadedTensors],
        tensors: Mapping[str, Tensor],
        content: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Keep a position, unless saving takes too much of the time.

        Args:
            stage: The stage under way.
            block: The block that comes next.
            activations: The streams before that block.
            tensors: This rank's `Position.tensors`.
            content: Function that gives `Position.content`. Called on the first rank, and only if the position is kept.
        """
        start = time.monotonic()
        if not self.ranks.on_first(lambda: start >= self._earliest):
            return
        serial = self._current["serial"] + 1
        folder = self._folder_of(serial)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended while it saved this
        folder.mkdir(parents=True)
        save_tensors(tensors, folder / "tensors.safetensors")
        for name, streams in activations.items():
            streams.save(folder / name)
        flush_all(folder)
        at = {"stage": stage, "block": block, "digests": self._digests(folder)}
        finished = self._current["finished"]
        self._current = self.ranks.on_first(lambda: self._commit(at | {"content": dict(content())}, finished))
        shutil.rmtree(self._folder_of(serial - 1), ignore_errors=True)
        end = time.monotonic()
        self._earliest = end + (end - start) * (1 / SHARE - 1)

    def _file_of(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"

    def _folder_of(self, serial: int) -> Path:
        return self.folder / f"at-{serial}-rank-{self.ranks.rank}"

    def _digests(self, folder: Path) -> list[str]:
        """SHA-256 over the files of a position, for each rank; all ranks call this with their own folder."""
        own = torch.zeros(self.ranks.size, 32, dtype=torch.int64, device=self.ranks.device)
        own[self.ranks.rank] = torch.tensor(list(_folder_digest(folder)), dtype=torch.int64)
        return [bytes(row).hex() for row in self.ranks.sum(own).tolist()]

    def _commit(self, at: dict[str, Any] | None, finished: dict[str, Any]) -> dict[str, Any]:
        """Make the state that lies there the current one."""
        current = {"serial": self._current["serial"] + 1, "finished": finished, "at": at}
        replace_json(self.folder / CURRENT, {"sha256": content_digest(current), "current": current})
        return current

    def _read(self) -> dict[str, Any] | None:
        """The current state as it was written, None if there is none."""
        path = self.folder / CURRENT
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["sha256"] == content_digest(stored["current"]):
                return stored["current"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        self._warn(path, "the run")
        return None

    def _warn(self, path: Path, begins: str) -> None:
        if self.ranks.first:
            warnings.warn(
                f"{path} is missing or not as it was written: {begins} begins anew.", EigensliceWarning, stacklevel=3
            )


def _sha256(path: Path) -> str:
    return file_hashes([path])[path.name]


def _folder_digest(folder: Path) -> bytes:
    """SHA-256 over the names and digests of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {_sha256(path)}\n".encode())
    return digest.digest()


def content_digest(content: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
