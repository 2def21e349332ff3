"""Running the canonical dense model over calibration sequences, one block at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from eigenslice.algebra.covariance import SecondMoment, normalize
from eigenslice.dense import DenseModel, Tensors
from eigenslice.errors import ActivationError
from eigenslice.forms import canonical_config
from eigenslice.modeling import SlicedConfig, SlicedForCausalLM

RANDOM_GROUP = -2
"""Group of sequences of random tokens: layers are fitted on them, too, but no basis or ridge is chosen by them."""


@dataclass(frozen=True)
class Batch:
    """Calibration sequences of one length.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 0 for padding; None if there is none.
        group: Number of the text that they are from, or of their part of it: what is fitted on some groups is tried
            on the others.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    group: int = 0

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
    group: int

    def rows(self, x: Tensor) -> Tensor:
        """The tokens of x (B, T, n) that count, (tokens, n), in at least float32."""
        rows = x.reshape(-1, x.shape[-1]) if self.mask is None else x[self.mask]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


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
        """Second moment of the stream here, as it is or as the norm leaves it; without padding and random tokens."""
        hidden = self.activations[0].hidden
        moment = SecondMoment(hidden.shape[-1], hidden.device)
        for a in (a for a in self.activations if a.group != RANDOM_GROUP):
            moment.add(normalize(a.hidden, self.eps) if normalized else a.hidden, a.mask)
        return moment

    def project(self, basis: Tensor) -> None:
        """Keep only the part of the stream in the span of a basis (D, width), in the same coordinates."""
        projector = (basis @ basis.T).to(self.activations[0].hidden.dtype)
        for a in self.activations:
            a.hidden = a.hidden @ projector


Observer = Callable[[int, Activations, Tensor], None]
"""Takes the number of a block, a batch before its MLP, and what the MLP's writer reads, (B, T, neurons)."""


@contextmanager
def captured_inputs(layer: nn.Module, modules: Sequence[str]) -> Iterator[Tensors]:
    """Give a dictionary that what is called inside the context fills with the inputs of these modules."""
    inputs: Tensors = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: inputs.update({name: args[0]})

    handles = [layer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with, by name."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.hidden: Tensor | None = None
        self._arguments, self._gives_tuple = layer.arguments, layer.gives_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.kwargs = hidden_states, kwargs | dict(zip(self._arguments, args, strict=False))
        return (hidden_states, None) if self._gives_tuple else hidden_states


class BlockRunner:
    """A model in the custom class's form without weights, into which they are put for as long as they are needed."""

    def __init__(self, config: SlicedConfig, layers: str, device: torch.device, dtype: torch.dtype) -> None:
        """layers: name of the model's list of decoder layers; device, dtype: where and in what precision they run."""
        self.device, self.dtype = device, dtype
        with init_empty_weights(include_buffers=False):
            self._whole: Any = SlicedForCausalLM(config).eval()
        for module in self._whole.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.model: Any = self._whole.model
        self.layers: Any = self.model.get_submodule(layers)

    def assign(self, module: nn.Module, tensors: Tensors) -> None:
        """Give a module weights, by name."""
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(device=self.device, dtype=self.dtype), requires_grad=False)
            setattr(module.get_submodule(parent), leaf, parameter)

    def release(self, module: nn.Module) -> None:
        """Take a module's weights away."""
        for parent in module.modules():
            for leaf, parameter in parent._parameters.items():
                if parameter is not None:
                    parent._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class Stream:
    """The canonical dense model, of which one block at a time has weights.

    Everything before the first layer (embeddings, masks, rotary angles) is transformers' own code, recorded by
    layers that do nothing.
    """

    def __init__(self, dense: DenseModel, device: torch.device, dtype: torch.dtype) -> None:
        """device, dtype: where and in what precision blocks run."""
        self.dense, self.device, self.dtype = dense, device, dtype
        self._runner = BlockRunner(canonical_config(dense), dense.table.layers, device, dtype)
        self._inner, self._layers = self._runner.model, self._runner.layers
        self._sites = dense.table.sites(dense.config)

    def _embed(self, batches: list[Batch]) -> list[Activations]:
        self._runner.assign(self._inner, self.dense.embeddings())
        parent, _, leaf = self.dense.table.layers.rpartition(".")
        recorders = [_Recorder(layer) for layer in self._layers]
        setattr(self._inner.get_submodule(parent), leaf, nn.ModuleList(recorders))
        shared: dict[torch.Size, list[dict[str, Any]]] = {}
        result = []
        for batch in batches:
            ids = batch.input_ids.to(self.device)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(self.device)
            self._inner.get_submodule(parent)(input_ids=ids, attention_mask=mask, use_cache=False)
            kwargs = [recorder.kwargs for recorder in recorders]
            if mask is None:  # the same for all batches of this shape
                kwargs = shared.setdefault(ids.shape, kwargs)
            hidden = recorders[0].hidden
            assert hidden is not None  # the model has called its first layer
            result.append(Activations(hidden, None if mask is None else mask.bool(), kwargs, batch.group))
        setattr(self._inner.get_submodule(parent), leaf, self._layers)
        for module in self.dense.table.embeddings:
            self._runner.release(self._inner.get_submodule(module))
        return result

    def walk(self, batches: list[Batch], observe: Observer | None = None) -> Iterator[Site]:
        """Yield the stream at each site, the last one before the head, and run the sublayers in between.

        Each block runs once. The consumer may change the activations at a site.

        Args:
            batches: The sequences.
            observe: Called for each batch with what the MLP's writer reads.

        Raises:
            ActivationError: NaN or infinite numbers; says in which block.
        """
        with torch.no_grad():
            activations = self._embed(batches)
            self._check(activations, "the embeddings give")
            eps = self.dense.eps
            for block in range(self.dense.blocks):
                folded, layer = self.dense.block(block), self._layers[block]
                self._runner.assign(layer, self.dense.as_modules(folded, self.dense.width))
                for site in range(len(layer.sites)):
                    yield Site(block, site, folded, activations, eps)
                    writers = self._observed(site)
                    for a in activations:
                        normalized = layer.normalize(site, a.hidden)
                        with captured_inputs(layer, writers if observe else ()) as inputs:
                            update = layer.update(site, normalized, **a.kwargs[block])
                        if observe and inputs:
                            observe(block, a, inputs[writers[0]])
                        a.hidden = a.hidden + update
                self._runner.release(layer)
                self._check(activations, f"block {block} (of 0 to {self.dense.blocks - 1}) gives")
            yield Site(self.dense.blocks, 0, None, activations, eps)

    def _observed(self, site: int) -> tuple[str, ...]:
        """The MLP's writer, if it is at this site of a block."""
        mlp = self.dense.table.mlp
        return mlp.writers[:1] if mlp in self._sites[site] else ()

    def _check(self, activations: list[Activations], where: str) -> None:
        for a in activations:
            if not torch.isfinite(a.hidden if a.mask is None else a.hidden[a.mask]).all():
                raise ActivationError(
                    f"{where} NaN or infinite activations in {str(self.dtype).removeprefix('torch.')}",
                    allowed="finite numbers",
                    next_step="check the checkpoint's weights; if they are finite, run with --compute-dtype float32",
                )
