"""Cutting neurons and heads out of a block, and storing what was changed."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines import shared_copy

STORED = "rival.safetensors"


def head_columns(attention: Any) -> int:
    """Columns of o_proj that belong to a key/value head: those of its query heads."""
    return attention.num_key_value_groups * attention.head_dim


def key_value_heads(attention: Any) -> int:
    """Number of key/value heads that are left."""
    return attention.k_proj.out_features // attention.head_dim


def columns_of(heads: Tensor, width: int) -> Tensor:
    """Indices of the rows or columns of heads (n,) that have so many each, (n * width,)."""
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()


def keep_neurons(mlp: Any, kept: Tensor, writer: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Keep neurons of an MLP.

    Args:
        mlp: An MLP of gate_proj, up_proj and down_proj.
        kept: Numbers of the neurons, (n,).
        writer: Their columns in down_proj, (D, n), where they change.
        bias: Vector (D,) to add to the output.
    """
    for linear in (mlp.gate_proj, mlp.up_proj):
        _keep_rows(linear, kept)
    _set(mlp.down_proj, mlp.down_proj.weight[:, kept] if writer is None else writer, _sum(mlp.down_proj.bias, bias))


def keep_heads(attention: Any, kept: Tensor, writer: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Keep key/value heads (n,) with their query heads; `writer` and `bias` are as in `keep_neurons`, for o_proj."""
    columns = columns_of(kept, head_columns(attention))
    _keep_rows(attention.q_proj, columns)
    for linear in (attention.k_proj, attention.v_proj):
        _keep_rows(linear, columns_of(kept, attention.head_dim))
    out = attention.o_proj
    _set(out, out.weight[:, columns] if writer is None else writer, _sum(out.bias, bias))


def _keep_rows(linear: Any, rows: Tensor) -> None:
    _set(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _set(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer parameters of its own."""
    dtype = linear.weight.dtype
    linear.out_features, linear.in_features = weight.shape
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(linear, name, nn.Parameter(value.detach().to(dtype).clone(), requires_grad=False))


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return old if new is None else new if old is None else old + new


def describe(model: Any) -> str:
    """Neurons and key/value heads of a pruned model: ranges over its blocks, and means."""
    neurons = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    heads = [key_value_heads(layer.self_attn) for layer in model.model.layers]
    return f"MLP {_range(neurons)}, key/value heads {_range(heads)}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high} (mean {sum(values) / len(values):.1f})"


def save(dense: Any, pruned: Any, folder: Path) -> None:
    """Write the parameters that the dense model doesn't share."""
    shared = {id(parameter) for parameter in dense.parameters()}
    own = {name: value.data.contiguous() for name, value in pruned.named_parameters() if id(value) not in shared}
    save_file(own, folder / STORED)


def load(dense: Any, folder: Path) -> Any:
    """The pruned model that was written."""
    pruned = shared_copy(dense)
    tensors = load_file(folder / STORED, device=str(dense.device))
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        linear = pruned.get_submodule(parent)
        if leaf == "weight":
            _set(linear, tensor, None)
        else:
            linear.bias = nn.Parameter(tensor, requires_grad=False)
    return pruned
