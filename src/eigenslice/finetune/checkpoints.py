"""Checkpoints of a training, each of them sealed: a run goes on from an unchanged checkpoint, or not at all.

A seal is written after all other files of a checkpoint have reached the disk, and holds the SHA-256 of each.
"""

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer import TRAINING_ARGS_NAME

from eigenslice.errors import CheckpointError, IncompleteError, RankError, first_line
from eigenslice.runtime.durable import file_hashes, flush, flush_all, replace_json
from eigenslice.runtime.ranks import Ranks
from eigenslice.runtime.run_state import content_digest

SEAL = "complete.json"
FOLDER = re.compile(r"checkpoint-(\d+)")
STATE_SUFFIXES = (".pt", ".pth")
"""Files that only resuming needs: the optimizer, the schedule, random numbers."""
PEERS = ("gloo", "nccl", "peer", "connection", "process group")
"""Parts of torch's messages, in lower case, if another process is gone."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, `checkpoint-STEP` each.

    The last two are kept to go on from, and the weights of the best one.

    Attributes:
        folder: The folder of the checkpoints.
    """

    folder: Path

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"checkpoint-{step}"

    def seal(self, step: int, best: int | None, last: bool) -> None:
        """Seal a complete checkpoint, and remove the checkpoints that it replaces. Raises OSError.

        Args:
            step: Step of the checkpoint.
            best: Step with the best weights so far, None if none are better than NaN.
            last: True if the training ends here.
        """
        path = self.path(step)
        (path / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nobody needs
        flush_all(path)
        content = {"step": step, "best": best, "last": last, "sha256": _digests(path)}
        replace_json(path / SEAL, {"sha256": content_digest(content), "seal": content})
        flush(self.folder)
        self._thin(step, best)

    def usable(self) -> tuple[dict[str, Any] | None, str]:
        """Return the last usable checkpoint, and the file that makes a later checkpoint unusable.

        Unusable checkpoints, and checkpoints of later steps, are removed.

        Returns:
            The seal, None if there is none; and the first file that is missing or has changed, "" if there is none.
        """
        changed, usable = "", None
        for step in sorted(self._sealed(), reverse=True):
            seal = self._seal(step)
            found = self._changed(step, seal)
            if not found and seal and seal["best"] not in (None, step):
                found = self._changed(seal["best"], self._seal(seal["best"]), only_weights=True)
            if not found:
                usable = seal
                break
            changed = changed or found
        self._remove({step for step in self._all() if usable is None or step > usable["step"]})
        self.remove_unsealed()
        return usable, changed

    def check_weights(self, step: int) -> None:
        """Refuse weights that have changed since they were written.

        Raises:
            IncompleteError.
        """
        found = self._changed(step, self._seal(step), only_weights=True)
        if found:
            raise IncompleteError(
                f"{found} is missing or not as it was written",
                allowed="the files of a run, unchanged until it is complete",
                next_step="check the disk, then run the same command with --resume: it goes on from an earlier point",
            )

    def remove_unsealed(self) -> None:
        """Remove checkpoints of a run that ended while it was writing."""
        self._remove(self._all() - self._sealed())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _all(self) -> set[int]:
        names = (FOLDER.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return {int(name[1]) for name in names if name}

    def _sealed(self) -> set[int]:
        return {step for step in self._all() if (self.path(step) / SEAL).exists()}

    def _seal(self, step: int) -> dict[str, Any] | None:
        """The seal of a checkpoint, None if there is none as it was written."""
        try:
            stored = json.loads((self.path(step) / SEAL).read_text(encoding="utf-8"))
            intact = stored["sha256"] == content_digest(stored["seal"]) and stored["seal"]["step"] == step
            return stored["seal"] if intact else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _changed(self, step: int, seal: dict[str, Any] | None, only_weights: bool = False) -> str:
        """The first file of a checkpoint that isn't as it was sealed, "" if all are."""
        path = self.path(step)
        if seal is None:
            return str(path / SEAL)
        sealed, present = seal["sha256"], _digests(path, only_weights)
        if only_weights:
            sealed = {name: digest for name, digest in sealed.items() if not name.endswith(STATE_SUFFIXES)}
        names = sorted(sealed.keys() | present.keys())
        return next((str(path / name) for name in names if sealed.get(name) != present.get(name)), "")

    def _thin(self, step: int, best: int | None) -> None:
        """Remove the files that a later checkpoint makes unnecessary."""
        sealed = self._sealed()
        before = max((other for other in sealed if other < step), default=None)
        seal = None if before is None else self._seal(before)
        weights = {best, seal["best"] if seal else None}
        self._remove(sealed - {step, before} - weights)
        for other in (sealed & weights) - {step, before}:
            for file in self.path(other).iterdir():
                if file.suffix in STATE_SUFFIXES:
                    file.unlink()

    def _remove(self, steps: set[int]) -> None:
        for step in sorted(steps):
            (self.path(step) / SEAL).unlink(missing_ok=True)  # first: half of a checkpoint must not look like one
            shutil.rmtree(self.path(step))


def load_weights(model: Any, folder: Path) -> None:
    """Give a model the weights of a checkpoint, all of them: Trainer itself passes over names that don't fit.

    Args:
        model: The one that is trained, maybe with adapters.
        folder: The checkpoint.

    Raises:
        CheckpointError: they are weights of another model.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        tensors = load_file(folder / "adapter_model.safetensors")
        fits = tensors.keys() == get_peft_model_state_dict(model).keys()
        if fits:
            set_peft_model_state_dict(model, tensors)
    else:
        stored = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype, use_safetensors=True)
        tensors = stored.state_dict()
        fits = tensors.keys() == model.state_dict().keys()
        if fits:
            model.load_state_dict(tensors)
    if not fits:
        raise CheckpointError(
            f"{folder} doesn't hold the weights that are trained",
            allowed="checkpoints of this run, unchanged",
            next_step=f"remove {folder.parent.parent} to start anew",
        )


@contextmanager
def storage_errors(ranks: Ranks) -> Iterator[None]:
    """Translate errors of libraries while they write, read or wait.

    Raises:
        OSError: a file can't be written.
        IncompleteError: a file holds something that torch doesn't load, such as code.
        RankError: another process is gone.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    except pickle.UnpicklingError as error:
        raise IncompleteError(
            f"the optimizer's state can't be loaded, and no code in it was run ({first_line(error)})",
            allowed="checkpoints of this run, unchanged",
            next_step="remove the work folder (OUTPUT.partial) to start anew",
        ) from error
    except RuntimeError as error:
        if any(frame.f_code.co_filename == torch.serialization.__file__ for frame, _ in walk_tb(error.__traceback__)):
            raise OSError(first_line(error)) from error  # torch.save says of a full disk many things
        if ranks.size > 1 and any(words in str(error).lower() for words in PEERS):
            raise RankError(
                f"rank {ranks.rank} of {ranks.size} lost the others ({first_line(error)})",
                allowed="all ranks running to the end",
                next_step="see what the rank that failed first printed, then run the same command with --resume",
            ) from error
        raise


def _digests(path: Path, only_weights: bool = False) -> dict[str, str]:
    """Return the SHA-256 of all files but the seal, by their paths in the checkpoint; "" for irregular files."""
    digests = {}
    for file in sorted(path.rglob("*")):
        regular = file.is_file() and not file.is_symlink()
        wanted = not (only_weights and file.suffix in STATE_SUFFIXES) and file.name not in (SEAL, f"{SEAL}.new")
        if wanted and (regular or not file.is_dir()):
            digests[file.relative_to(path).as_posix()] = file_hashes([file])[file.name] if regular else ""
    return digests
