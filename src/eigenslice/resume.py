"""What an interrupted run needs to go on, kept in files while it works."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from eigenslice.offload import OffloadedTensors, save_tensors
from eigenslice.ranks import Ranks

CURRENT = "current.json"
SHARE = 0.02
"""Share of the time that saving may take: where blocks take milliseconds, not every one is saved."""


@dataclass(frozen=True)
class Position:
    """Where a stage was when its state was saved, before the first site of a block.

    Attributes:
        block: That block.
        tensors: What the stage had summed up or decided.
        content: The same for numbers and text; every value is JSON.
        folder: Holds the activations.
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

    A state is complete before `current.json` names it, and that file is replaced in one step.

    Attributes:
        folder: Where the files are.
        ranks: Each rank saves its own tensors.
    """

    folder: Path
    ranks: Ranks
    _current: dict[str, Any] = field(default_factory=lambda: {"serial": 0, "finished": {}, "at": None})
    _earliest: float = 0.0

    def __post_init__(self) -> None:
        if self.ranks.on_first(lambda: (self.folder / CURRENT).exists()):
            self._current = json.loads((self.folder / CURRENT).read_text(encoding="utf-8"))

    def result(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a stage gave, if it is finished."""
        found = self._current["finished"].get(stage)
        return None if found is None else (load_file(self.folder / found["file"]), found["content"])

    def finish(self, stage: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Keep what a stage gave, the same on all ranks, and forget its position."""

        def keep() -> int:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, self.folder / f"{stage}.safetensors")
            self._current["finished"][stage] = {"file": f"{stage}.safetensors", "content": dict(content)}
            return self._commit(None)

        before = self._current["serial"]
        self._current["serial"] = self.ranks.on_first(keep)
        shutil.rmtree(self._folder_of(before), ignore_errors=True)
        self._earliest = 0.0

    def position(self, stage: str) -> Position | None:
        """Where a stage was, if it is the one that was interrupted."""
        at = self._current["at"]
        if at is None or at["stage"] != stage:
            return None
        folder = self._folder_of(self._current["serial"])
        return Position(at["block"], load_file(folder / "tensors.safetensors"), at["content"], folder)

    def save(
        self,
        stage: str,
        block: int,
        activations: Mapping[str, OffloadedTensors],
        tensors: Mapping[str, Tensor],
        content: Mapping[str, Any],
    ) -> None:
        """Keep a position, unless saving takes too much of the time.

        Args:
            stage: The stage under way.
            block: The block that comes next.
            activations: The streams before that block.
            tensors: See `Position`; each rank's own.
            content: See `Position`; the first rank's is kept.
        """
        start = time.monotonic()
        if not self.ranks.on_first(lambda: start >= self._earliest):
            return
        serial = self._current["serial"] + 1
        folder = self._folder_of(serial)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended while it saved this
        folder.mkdir(parents=True)
        save_tensors(tensors, folder / "tensors.safetensors")
        for name, held in activations.items():
            held.save(folder / name)
        self.ranks.wait()
        at = {"stage": stage, "block": block, "content": dict(content)}
        self._current["serial"] = self.ranks.on_first(lambda: self._commit(at))
        shutil.rmtree(self._folder_of(serial - 1), ignore_errors=True)
        end = time.monotonic()
        self._earliest = end + (end - start) * (1 / SHARE - 1)

    def _folder_of(self, serial: int) -> Path:
        return self.folder / f"at-{serial}-rank-{self.ranks.rank}"

    def _commit(self, at: dict[str, Any] | None) -> int:
        """Make the state that lies there the current one; its number."""
        self._current |= {"serial": self._current["serial"] + 1, "at": at}
        path = self.folder / f"{CURRENT}.new"
        path.write_text(json.dumps(self._current), encoding="utf-8")
        path.replace(self.folder / CURRENT)
        return self._current["serial"]
