"""The weight files that the last pass of a run writes, and their part of the saved state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eigenslice.checkpoint.writer import GIB, ShardWriter
from eigenslice.cut.naming import StoredForm
from eigenslice.model.dense import NamedTensors
from eigenslice.plan.plan import Plan
from eigenslice.runtime.run_state import Position
from eigenslice.stream.run import Run

SLICING_STAGE = "slicing"


@dataclass(frozen=True)
class ResultFiles:
    """The weight files of a result; only the first rank writes them.

    Attributes:
        run: The run.
        plan: The plan of the result.
        writer: The writer of the files. It knows which tensors have been written.
        stored_form: The names of tensors in the files.
    """

    run: Run
    plan: Plan
    writer: ShardWriter
    stored_form: StoredForm

    @classmethod
    def begin(cls, run: Run, plan: Plan, folder: Path, dtype: torch.dtype, shard_gib: float) -> "ResultFiles":
        """Begin to write files of at most `shard_gib` GiB into a folder, or go on with existing files."""
        stored_form = StoredForm(run.dense.anatomy, plan)
        writer = ShardWriter(folder, stored_form.shapes, dtype, int(shard_gib * GIB), stored_form.in_float32)
        run.ranks.on_first(writer.begin)
        return cls(run, plan, writer, stored_form)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the files."""
        return self.writer.dtype

    def write(self, tensors: NamedTensors) -> None:
        """Write tensors that have the dense model's names."""
        if self.run.ranks.first:
            for name, tensor in self.stored_form(tensors):
                self.writer.add(name, tensor)

    def content(self) -> dict[str, Any]:
        """Return the state of the files, for `Position.content`. All that was written is on the disk then."""
        return {"dtype": str(self.dtype), "written": self.writer.flushed()}

    def position(self) -> Position | None:
        """Return the position of an interrupted last pass, if the files are as they were then, in the same dtype."""
        state = self.run.state
        position = state.position(SLICING_STAGE)
        if position is None or position.content["dtype"] != str(self.dtype):
            return None
        written = position.content["written"]
        if not self.run.ranks.on_first(lambda: self.writer.holds(written)):
            state.forget(SLICING_STAGE, self.writer.folder)
            return None
        self.writer.checksums.update(written)
        return position
