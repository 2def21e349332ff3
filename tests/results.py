"""Results of runs: loading them, and what they store."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def load(folder: Path, **kwargs: Any) -> Any:
    """Load a model as a user would."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference as a share of what was expected."""
    return float((actual - expected).norm() / expected.norm())


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def size(model: Any) -> int:
    """Numbers that a model's checkpoint has to hold: parameters and buffers, what is shared once."""
    tensors = {t.data_ptr(): t.numel() for t in model.state_dict().values()}
    return sum(tensors.values())
