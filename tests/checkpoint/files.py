"""Changing a copy of a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenslice.checkpoint.weights import SINGLE
from eigenslice.model.dense import DenseModel

Tensors = dict[str, Tensor]


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a checkpoint's folder."""
    return Path(shutil.copytree(folder, target))


def tensors_of(folder: Path) -> Tensors:
    """All tensors of an unsharded checkpoint."""
    return load_file(folder / SINGLE)


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change an unsharded checkpoint's tensors in place."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def edit_json(path: Path, **values: Any) -> None:
    """Set values of a JSON file; None removes."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def weight_of(dense: DenseModel, name: str) -> Tensor:
    """A tensor as the checkpoint has it; it must be there."""
    tensor = dense.raw(name)
    assert tensor is not None, name
    return tensor
