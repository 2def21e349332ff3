"""Rotary angles in a GGUF: factors of the frequencies, and the order of rows in queries and keys.

llama.cpp rotates pair i of a head by position x theta^(-2i / head_dim), divided by a factor if there is one. So types
of angles that it doesn't know become factors: the ratio of this angle and transformers' angle. A pair that transformers
doesn't rotate gets a factor so large that the angle is zero.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eigenslice.export.gguf.config import dense_config, head_dim, rope_parameters

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
UNTURNED = 1e30


def rope_type(config: Any) -> str:
    """transformers' name for how the angles are made."""
    return rope_parameters(config).get("rope_type", "default")


def rotary_dim(config: Any) -> int:
    """Return the count of rotated numbers in a head, which are the first ones."""
    return int(head_dim(config) * rope_parameters(config).get("partial_rotary_factor", 1.0))


def frequencies(config: Any, length: int | None = None) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, (rotary / 2,), and the factor of sines and cosines, at a length."""
    dense, dim = dense_config(config), rotary_dim(config)
    kind = rope_type(config)
    if kind in ("llama3", "longrope"):
        angles, factor = ROPE_INIT_FUNCTIONS[kind](dense, torch.device("cpu"), length)
        return angles.double(), float(factor)
    return rope_parameters(config)["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0


def _factors(config: Any, length: int | None = None) -> Tensor:
    """Return llama.cpp's divisors of the frequencies, (head_dim / 2,)."""
    dim = head_dim(config)
    plain = rope_parameters(config)["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles, _ = frequencies(config, length)
    factors = torch.full_like(plain, UNTURNED)
    factors[: len(angles)] = plain[: len(angles)] / angles
    return factors


def rope_factors(config: Any, whole: bool) -> dict[str, Tensor]:
    """Return tensors with llama.cpp's divisors of the rotary frequencies; none if all divisors are equal.

    Args:
        config: The model's config.
        whole: True if llama.cpp rotates whole heads; then factors keep a part of each head unrotated.
    """
    kind = rope_type(config)
    if kind == "longrope":
        length = rope_parameters(config)["original_max_position_embeddings"]
        return {SHORT: _factors(config), LONG: _factors(config, length + 1)}
    if kind == "llama3" or (whole and rotary_dim(config) != head_dim(config)):
        return {FREQUENCIES: _factors(config)}
    return {}


def interleave(rows: Tensor, heads: int, rotary: int | None = None) -> Tensor:
    """Rows of a query or key projection (or its bias) in the order of interleaved angles, (heads * head_dim, ...).

    Args:
        rows: The rows in transformers' order, where the two numbers of a pair lie half of the rotated numbers apart.
        heads: Number of heads.
        rotary: Count of rotated numbers in a head, which are the first ones; None for all.
    """
    split = rows.unflatten(0, (heads, -1))
    rotary = split.shape[1] if rotary is None else rotary
    pairs = split[:, :rotary].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, split[:, rotary:]], dim=1).flatten(0, 1)


def scale_rotary(rows: Tensor, heads: int, rotary: int, factor: float) -> Tensor:
    """Return rows of a query or key projection, multiplied by transformers' factor of sines and cosines.

    llama.cpp can multiply by this factor, too, but then it also multiplies the unrotated numbers.
    """
    scaled = rows.unflatten(0, (heads, -1)).clone()
    scaled[:, :rotary] *= factor
    return scaled.flatten(0, 1)
