"""Running the canonical dense model over calibration sequences, one block at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from eigenslice.algebra.covariance import SecondMoment, normalize
from eigenslice.dense import DenseModel, Tensors
from eigenslice.errors import ActivationError
from eigenslice.forms import canonical_config
from eigenslice.modeling import SlicedForCausalLM


@dataclass(frozen=True)
class Batch:
    """Calibration sequences of one length.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 0 for padding; None if there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


@dataclass
class Activations:
    """The residual stream of one batch, (B, T, D), and what its decoder layers are called with."""

    hidden: Tensor
    mask: Tensor | None
    kwargs: list[dict[str, Any]]


@dataclass(frozen=True)
class Site:
    """The stream at one site; what the consumer of `Stream.walk` sees.

    Attributes:
        block: Number of the block, or the number of blocks before the head.
        index: Number of the site within its block.
        folded: The block's canonical weights, None before the head.
        activations: One per batch; may be changed before the walk goes on.
    """

    block: int
    index: int
    folded: Tensors | None
    activations: list[Activations]
    eps: float

    def moment(self, normalized: bool) -> SecondMoment:
        """Second moment of the stream here, as it is or as the norm leaves it; padding doesn't count."""
        hidden = self.activations[0].hidden
        moment = SecondMoment(hidden.shape[-1], hidden.device)
        for a in self.activations:
            moment.add(normalize(a.hidden, self.eps) if normalized else a.hidden, a.mask)
        return moment

    def project(self, basis: Tensor) -> None:
        """Keep only the part of the stream in the span of a basis (D, width), in the same coordinates."""
        projector = (basis @ basis.T).to(self.activations[0].hidden.dtype)
        for a in self.activations:
            a.hidden = a.hidden @ projector


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


class Stream:
    """The canonical dense model, of which one block at a time has weights.

    Everything before the first layer (embeddings, masks, rotary angles) is transformers' own code, recorded by
    layers that do nothing.
    """

    def __init__(self, dense: DenseModel, device: torch.device, dtype: torch.dtype) -> None:
        """device, dtype: where and in what precision blocks run."""
        self.dense, self.device, self.dtype = dense, device, dtype
        with init_empty_weights(include_buffers=False):
            self._model: Any = SlicedForCausalLM(canonical_config(dense)).eval()
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._inner = self._model.model
        self._layers: Any = self._inner.get_submodule(dense.table.layers)

    def _assign(self, module: nn.Module, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(device=self.device, dtype=self.dtype), requires_grad=False)
            setattr(module.get_submodule(parent), leaf, parameter)

    def _release(self, module: nn.Module) -> None:
        for parent in module.modules():
            for leaf, parameter in parent._parameters.items():
                if parameter is not None:
                    parent._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _embed(self, batches: list[Batch]) -> list[Activations]:
        self._assign(self._inner, self.dense.embeddings())
        parent, _, leaf = self.dense.table.layers.rpartition(".")
        recorders = [_Recorder() for _ in range(self.dense.blocks)]
        setattr(self._inner.get_submodule(parent), leaf, nn.ModuleList(recorders))
        shared: dict[torch.Size, list[dict[str, Any]]] = {}
        result = []
        for batch in batches:
            ids = batch.input_ids.to(self.device)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(self.device)
            self._inner.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            kwargs = [recorder.kwargs for recorder in recorders]
            if mask is None:  # the same for all batches of this shape
                kwargs = shared.setdefault(ids.shape, kwargs)
            hidden = recorders[0].hidden
            assert hidden is not None  # the model has called its first layer
            result.append(Activations(hidden, None if mask is None else mask.bool(), kwargs))
        setattr(self._inner.get_submodule(parent), leaf, self._layers)
        for module in self.dense.table.embeddings:
            self._release(self._inner.get_submodule(module))
        return result

    def walk(self, batches: list[Batch]) -> Iterator[Site]:
        """Yield the stream at each site, the last one before the head, and run the sublayers in between.

        Each block runs once. The consumer may change the activations at a site.

        Raises:
            ActivationError: NaN or infinite numbers; says in which block.
        """
        with torch.no_grad():
            activations = self._embed(batches)
            self._check(activations, "the embeddings give")
            eps = self.dense.eps
            for block in range(self.dense.blocks):
                folded, layer = self.dense.block(block), self._layers[block]
                self._assign(layer, folded)
                for site in range(len(layer.sites)):
                    yield Site(block, site, folded, activations, eps)
                    for a in activations:
                        normalized = layer.normalize(site, a.hidden)
                        a.hidden = a.hidden + layer.update(site, normalized, **a.kwargs[block])
                self._release(layer)
                self._check(activations, f"block {block} (of 0 to {self.dense.blocks - 1}) gives")
            yield Site(self.dense.blocks, 0, None, activations, eps)

    def _check(self, activations: list[Activations], where: str) -> None:
        for a in activations:
            if not torch.isfinite(a.hidden if a.mask is None else a.hidden[a.mask]).all():
                raise ActivationError(
                    f"{where} NaN or infinite activations in {str(self.dtype).removeprefix('torch.')}",
                    allowed="finite numbers",
                    next_step="check the checkpoint's weights; if they are finite, run with --compute-dtype float32",
                )
