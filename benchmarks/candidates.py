"""The models that quality.py measures: sliced ones in folders, baselines and rivals built from the dense model.

What is known of each is kept in its folder, so that an interrupted benchmark goes on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from baselines import Baseline, Importance, drop_blocks, measure, prune_width, stored, without_blocks
from eigenslice import CalibrationOptions, SliceOptions, slice_model
from eigenslice.checkpoint.loading import load_model
from eigenslice.data.batches import Batch
from eigenslice.options.common import DtypeName
from eigenslice.runtime.output import partial_path
from rivals import RIVALS
from rivals.parts import describe
from rivals.parts import load as load_rival
from rivals.parts import save as save_rival

SLICED: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-custom": {"form": "custom"},
    "ours-quarter": {"own_text": 0.25},  # less of the model's own text
    "ours-custom-quarter": {"form": "custom", "own_text": 0.25},
    "ours-given": {"own_text": 0.0},  # nothing but the given text and random tokens
    "ours-custom-given": {"form": "custom", "own_text": 0.0},
    "paper-per-block": {"basis": "per-block", "refit": False},
}
BASELINES: dict[str, Baseline] = {"drop-blocks": drop_blocks, "width-pruning": prune_width}
PRUNED = [*BASELINES, *RIVALS]
"""Methods that build a model from the dense one in memory."""
RECORD = "quality.json"


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        row: What its row says of it before it is measured.
        load: Gives the model.
        folder: Holds its record.
    """

    row: dict[str, Any]
    load: Callable[[], Any]
    folder: Path


@dataclass(frozen=True)
class Slicer:
    """Slices by eigenslice, into the work folder; what is there is taken as it is, an interrupted run goes on."""

    model: str
    calibration: CalibrationOptions
    device: str | None
    dtype: DtypeName | None
    work: Path

    def __call__(self, method: str, size: float) -> Candidate:
        """Raises EigensliceError, for example where no width of the method reaches the size."""
        folder = self.work / f"{method}-{size:g}"
        if not folder.exists():
            options = {"model": self.model, "output": folder, "calibration": self.calibration, "device": self.device}
            begun, start = partial_path(folder).exists(), time.perf_counter()
            slice_model(SliceOptions(keep=size, resume=True, **options, **SLICED[method]))
            seconds = round(time.perf_counter() - start, 1)
            record(folder, {"seconds": None if begun else seconds})  # the first part's time isn't known
            print(f"{folder.name}: sliced in {seconds} s", flush=True)
        manifest = json.loads((folder / "eigenslice.json").read_text(encoding="utf-8"))
        row = {
            "method": method,
            "size": size,
            "kept": manifest["parameters"]["kept"],
            "parameters": manifest["parameters"]["stored"],
            "plan": plan_text(manifest),
            "saved_as": manifest.get("model_type"),
            "seconds": recorded(folder).get("seconds"),
        }
        return Candidate(row, lambda: load_model(str(folder), self.device, self.dtype).model, folder)


@dataclass(frozen=True)
class Pruner:
    """Builds baselines and rivals.

    One run over the calibration tokens, when it is needed, serves all baselines. A rival runs over the tokens itself;
    what it changed stays in its folder.
    """

    dense: Any
    batches: list[Batch]
    work: Path

    @cached_property
    def importance(self) -> Importance:
        print("measuring importance for the baselines", flush=True)
        return measure(self.dense, self.batches)

    def __call__(self, method: str, size: float) -> Candidate:
        """Raises EigensliceError where the model isn't Llama-like, or can't be made so small."""
        folder = self.work / f"{method}-{size:g}"

        def build() -> tuple[Any, str]:
            most = int(size * stored(self.dense))
            if method in BASELINES:
                return BASELINES[method](self.dense, self.importance, most)
            if "row" in recorded(folder):  # built and stored before: it takes minutes
                return load_rival(self.dense, folder), ""
            print(f"{folder.name}: pruning", flush=True)
            pruned = RIVALS[method](self.dense, self.batches, most)
            folder.mkdir(exist_ok=True)
            save_rival(self.dense, pruned, folder)
            return pruned, describe(pruned)

        if "row" not in recorded(folder):
            start = time.perf_counter()
            model, plan = build()
            sizes = {"kept": stored(model) / stored(self.dense), "parameters": stored(model)}
            row = {"method": method, "size": size} | sizes | {"plan": plan, "saved_as": None}
            folder.mkdir(exist_ok=True)
            record(folder, {"row": row | {"seconds": round(time.perf_counter() - start, 1)}})
        return Candidate(recorded(folder)["row"], lambda: build()[0], folder)


def plan_text(manifest: dict[str, Any]) -> str:
    """What a sliced model looks like: the numbers of its plan, or its widths."""
    plan, widths = manifest.get("plan"), sorted(set(manifest["site_widths"][:-1]))  # the head's may be the dense one
    if isinstance(plan, dict):
        return ", ".join(
            without_blocks(value) if name == "dropped_blocks" else f"{name} {_number(value)}"
            for name, value in plan.items()
        )
    return str(plan) if plan else "width " + " to ".join(map(str, dict.fromkeys((widths[0], widths[-1]))))


def _number(value: Any) -> str:
    """A plan's entry; one that differs from block to block by its range and mean."""
    return f"{min(value)} to {max(value)} ({sum(value) / len(value):.0f})" if isinstance(value, list) else str(value)


def recorded(folder: Path) -> dict[str, Any]:
    """What is known of a result."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(folder: Path, content: dict[str, Any]) -> None:
    """Add to what is known of a result; the folder must exist."""
    (folder / RECORD).write_text(json.dumps(recorded(folder) | content, indent=2), encoding="utf-8")
