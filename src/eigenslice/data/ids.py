"""Token ids from safetensors files."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eigenslice.errors import CalibrationError, first_line, one_line

DEFAULT_TENSOR = "calibration"
MASK = "attention_mask"
MOST = 2**31
"""Numbers in a tensor at most: a thousand times the tokens that are calibrated on in earnest."""


def longest_sequence(config: Any) -> int | None:
    """Tokens that a model of this config takes at most, if it says so."""
    return getattr(config, "max_position_embeddings", None)


def read_token_ids(path: Path, name: str, config: Any) -> tuple[Tensor, Tensor | None]:
    """A matrix of token ids (sequences, tokens), and the mask beside it if the file has one; both int64.

    Raises:
        CalibrationError: the file can't be read, has no such tensor, or the model can't take the tensor.
    """
    names, wrong, ids, mask = [], None, None, None
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = [file.get_slice(key).get_shape() for key in names if key in (name, MASK)]
            wrong = next((f"has {prod(shape)} numbers, shape {shape}" for shape in shapes if prod(shape) > MOST), None)
            if name in names and not wrong:
                ids = file.get_tensor(name)
                mask = file.get_tensor(MASK) if MASK in names else None
        wrong = wrong or (_why_no_ids(ids, mask, config) if ids is not None else None)
    except Exception as error:  # safetensors', the system's, and torch's for dtypes that it can't compare
        raise CalibrationError(
            f"{path} is not a readable safetensors file: {first_line(error)}",
            allowed="a safetensors file with an integer matrix, sequences x tokens",
            next_step="write the file again",
        ) from error
    if name not in names:
        raise CalibrationError(
            f"{path} has no tensor {name!r}; it has {one_line(', '.join(names)) or 'none'}",
            allowed=f"a tensor {DEFAULT_TENSOR!r}, or the one that --field names",
            next_step="name the tensor with --field",
        )
    if wrong or ids is None:
        raise CalibrationError(
            f"{path}: tensor {name!r} {wrong}",
            allowed=f"an integer matrix, sequences x tokens, of ids from 0 to {config.vocab_size - 1}; beside it "
            "an attention_mask of the same shape, 0 for padding and 1 for tokens, if sequences are padded",
            next_step="write the token ids of this model's tokenizer",
        )
    return ids.long(), None if mask is None else mask.long()


def _why_no_ids(ids: Tensor, mask: Tensor | None, config: Any) -> str | None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 2:
        return f"is {_dtype(ids)} of shape {tuple(ids.shape)}"
    if ids.numel() == 0 or ids.shape[1] < 2:
        return f"is empty or has sequences of less than 2 tokens: shape {tuple(ids.shape)}"
    low, high = int(ids.long().min()), int(ids.long().max())  # larger numbers than int64 holds are negative there
    if low < 0 or high >= config.vocab_size:
        return f"has ids from {low} to {high}" + " as int64" * (ids.dtype == torch.uint64)
    longest = longest_sequence(config)
    if longest and ids.shape[1] > longest:
        return f"has sequences of {ids.shape[1]} tokens; the model takes {longest}"
    if mask is not None and (mask.shape != ids.shape or not mask.any()):
        return f"comes with an attention_mask of shape {tuple(mask.shape)} that marks {int(mask.sum())} tokens"
    if mask is not None and (mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all())):
        return f"comes with an attention_mask of other numbers than 0 and 1, in {_dtype(mask)}"
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
