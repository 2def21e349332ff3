"""The experts inside of models of transformers, dense or sliced."""

from typing import Any

import torch

from eigenslice.arch import Sublayer, Table, lookup
from eigenslice.modeling import SlicedForCausalLM
from eigenslice.stream.runner import has_experts


def table_of(model: Any) -> Table:
    return lookup(getattr(model.config, "text_config", model.config))


def inside_mixtures(model: Any, name: str) -> list[Any]:
    """A module of each layer that has experts."""
    table, inner = table_of(model), model.model if isinstance(model, SlicedForCausalLM) else model
    layers = inner.get_submodule(table.layers)
    return [layer.get_submodule(name) for layer in layers if has_experts(layer, table.mlp)]


def experts_of(model: Any) -> list[Any]:
    """Experts of the layers that have them."""
    return inside_mixtures(model, table_of(model).mlp.experts)


def shared_of(model: Any) -> list[Any]:
    """Writers of the shared experts that lose neurons together with the others."""
    name = table_of(model).mlp.shared_writer
    return inside_mixtures(model, name) if name else []


def ends(experts: Any, mlp: Sublayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Readers (experts, 2 x neurons, width) and writers (experts, width, neurons), as views."""
    weights = (getattr(experts, name.rpartition(".")[2]).data for name in mlp.stacked)
    reader, writer = (weight.transpose(-1, -2) if mlp.transposed else weight for weight in weights)
    return reader, writer


def neurons_of(model: Any) -> set[int]:
    """Neurons of all experts, by what their readers give and what their writers take."""
    mlp = table_of(model).mlp
    pairs = [ends(experts, mlp) for experts in experts_of(model)]
    return {count for reader, writer in pairs for count in (reader.shape[1] // 2, writer.shape[2])}
