"""Runs outside of `slice_model`: one process, activations on the device, and a state of their own."""

import tempfile
from pathlib import Path

import torch

from eigenslice.data import Tokens
from eigenslice.data.batches import Batch
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import Offload
from eigenslice.runtime.progress import Progress, no_progress
from eigenslice.runtime.ranks import ALONE
from eigenslice.runtime.run_state import RunState
from eigenslice.stream.run import Run


def run_of(dense: DenseModel, batches: list[Batch], folder: Path, progress: Progress = no_progress) -> Run:
    """Return a run in float32 whose saved state is empty.

    Args:
        dense: The dense model.
        batches: The calibration sequences.
        folder: A folder in which the state gets a new folder.
        progress: Called as the work goes on.
    """
    state = RunState(Path(tempfile.mkdtemp(dir=folder)), ALONE)
    offload = Offload("device", dense.device)
    return Run(dense, Tokens(batches, {}), torch.float32, offload, ALONE, state, progress)
