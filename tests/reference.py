"""SliceGPT in a few lines on transformers' own model, in float64: an independent reference.

Slicing to a basis Q at a site is the same as projecting the dense model's stream there onto the span of Q. So the
reference changes no weight: it projects, with hooks on the dense model's modules. The stream before a decoder
layer is the layer's input. In the middle of a layer, the MLP's norm gets the projected stream, and what the
projection took off is subtracted from what the layer adds.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenslice.arch import Table, lookup
from tests.results import load


def load_wide(folder: Path, dtype: torch.dtype) -> Any:
    """The dense model in a wide dtype. (Only the plain implementation of experts takes float64.)"""
    model = load(folder, dtype=dtype)
    if lookup(model.config).mlp.stacked:
        model.set_experts_implementation("eager")
    return model


def layers_of(model: Any) -> Any:
    """Return a model's decoder layers."""
    return model.get_submodule(lookup(model.config).layers)


def without_block(model: Any, block: int) -> Any:
    """Let a decoder layer of a model give the stream back as it is; run it without a cache."""
    as_tuple = lookup(model.config).layers_give_tuples
    layers_of(model)[block].forward = lambda hidden, *args, **kwargs: (hidden, None) if as_tuple else hidden
    return model


def site_names(table: Table, config: Any) -> list[str]:
    """One name per site: the decoder layer's for the first one in it, the norm's for the others."""
    names = []
    for index in range(config.num_hidden_layers):
        names.append(f"{table.layers}.{index}")
        if not table.is_parallel(config):
            names.append(f"{table.layers}.{index}.{table.mlp.norm or table.mlp.modules[0]}")
    return [*names, table.final_norm]


class Projection:
    """Projects the stream at one site and records it."""

    def __init__(self, model: Any, name: str, table: Table) -> None:
        self.seen: list[Tensor] = []
        self.projector: Tensor | None = None
        self._centre, self._taken = table.norm == "layer", torch.tensor(0.0)
        self._scale = getattr(model.config, table.residual_scale) if table.residual_scale else 1.0
        module = model.get_submodule(name)
        self.handles = [module.register_forward_pre_hook(self._before, with_kwargs=True)]
        if name.startswith(table.layers) and name.endswith(table.mlp.norm or table.mlp.modules[0]):
            layer = model.get_submodule(name.rpartition(".")[0])
            last = layer.get_submodule(table.mlp.modules[-1])
            self.handles.append(last.register_forward_hook(self._after))

    def _before(self, module: Any, args: tuple[Tensor, ...], kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] - args[0].mean(-1, keepdim=True) if self._centre else args[0]
        self.seen.append(x)
        kept = x if self.projector is None else x @ self.projector
        self._taken = args[0] - kept
        return (kept, *args[1:]), kwargs

    def _after(self, module: Any, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):  # beside it, a router's logits
            return (self._after(module, args, output[0]), *output[1:])
        taken = (self._taken / self._scale).reshape(output.shape)  # the layer multiplies what it adds
        return output - taken


@contextmanager
def projections(model: Any) -> Iterator[list[Projection]]:
    """Hooks at all sites of a model, in order."""
    table = lookup(model.config)
    with ExitStack() as stack:
        sites = [Projection(model, name, table) for name in site_names(table, model.config)]
        for site in sites:
            for handle in site.handles:
                stack.callback(handle.remove)
        yield sites


def moment(x: Tensor) -> Tensor:
    """x^T x over all tokens."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows


def top(matrix: Tensor, width: int) -> Tensor:
    """Projector onto the eigenvectors of the `width` largest eigenvalues."""
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, -width:]
    return vectors @ vectors.T


def per_block_logits(model: Any, calibration: Tensor, ids: Tensor, width: int, last: bool) -> Tensor:
    """The paper's algorithm: each site's basis from the network sliced so far.

    The last site is only sliced where transformers' code wants its output as wide as its input (`last`).
    """
    with projections(model) as sites, torch.no_grad():
        for site in sites if last else sites[:-1]:
            model(calibration)
            site.projector = top(moment(site.seen[-1]), width)
        return model(ids).logits


def global_logits(model: Any, calibration: Tensor, ids: Tensor, width: int, head_weight: float, tied: bool) -> Tensor:
    """One basis from the normalized streams of all sites; tied, the head sees the gain only inside of it."""
    eps = lookup(model.config).epsilon(model.config)
    with projections(model) as sites, torch.no_grad():
        model(calibration)
        moments = [moment(rms_norm(site.seen[-1], eps)) for site in sites]
        projector = top(sum(moments[:-1], head_weight * moments[-1]), width)
        for site in sites:
            site.projector = projector
        logits = model(ids).logits
        if not tied:
            return logits
        # E P diag(g) P x instead of E diag(g) P x, for the same x
        table = lookup(model.config)
        gain = model.get_submodule(table.final_norm).weight + (1 if table.gain == "1+w" else 0)
        scale = table.logit_scale(model.config) if table.logit_scale else 1
        x = rms_norm(sites[-1].seen[-1] @ projector, eps)
        logits = scale * (gain * x) @ projector @ model.get_input_embeddings().weight.T
        cap = getattr(model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
