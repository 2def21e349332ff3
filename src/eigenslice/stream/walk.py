"""Running the canonical dense model over calibration sequences, one block at a time."""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenslice.algebra.covariance import SecondMoment, normalize
from eigenslice.algebra.finite import all_finite
from eigenslice.arch import Sublayer
from eigenslice.data.batches import BESIDE_GROUP, Batch
from eigenslice.errors import ActivationError, CheckpointError, EigensliceError, first_line
from eigenslice.model.dense import DenseModel
from eigenslice.model.folding import FoldedBlock
from eigenslice.plan.result_config import canonical_config
from eigenslice.runtime.device import trim_memory
from eigenslice.runtime.offload import Offload, OffloadedTensors
from eigenslice.runtime.run_state import Position
from eigenslice.stream.runner import BlockRunner, CallRecorder, captured_inputs, has_module

STREAMS = "dense"
"""Name of the dense model's streams in a saved state."""


@dataclass(frozen=True)
class Activations:
    """The residual stream of one batch, and the arguments of its decoder layers."""

    streams: OffloadedTensors
    number: int
    mask: Tensor | None
    kwargs: list[dict[str, Any]]
    group: int
    unnormed: OffloadedTensors
    """Input of the post norm before the current site, (B, T, D) for each batch; empty without such a norm."""

    @property
    def hidden(self) -> Tensor:
        """The stream, (B, T, D), on the device."""
        return self.streams[self.number]

    def put(self, hidden: Tensor) -> None:
        """Let the stream be another."""
        self.streams[self.number] = hidden

    def keep_unnormed(self, tensor: Tensor) -> None:
        """Keep the input of a post norm."""
        if self.number < len(self.unnormed):
            self.unnormed[self.number] = tensor
        else:
            self.unnormed.append(tensor)

    def rows(self, x: Tensor) -> Tensor:
        """The tokens of x (B, T, n) that count, (tokens, n), in at least float32."""
        rows = x.reshape(-1, x.shape[-1]) if self.mask is None else x[self.mask]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True)
class Site:
    """The stream at one site, for the consumer of `Stream.walk`.

    Attributes:
        block: Number of the block, or the number of blocks before the head.
        index: Number of the site within its block.
        layer: The block with its canonical weights, in the dtype of the stream; None before the head.
        folded: The canonical weights, if the walk was asked to hold them.
        activations: Activations, one per batch; their streams may be changed before the walk goes on.
        streams: The streams of the activations.
        width, eps: The stream's width D and the norms' epsilon.
        resumed: True if the walk goes on here after an interruption.
    """

    block: int
    index: int
    layer: Any
    folded: FoldedBlock | None
    activations: list[Activations]
    streams: OffloadedTensors
    width: int
    eps: float
    resumed: bool = False

    @property
    def passed_block(self) -> bool:
        """True where the stream has just passed a block. False where a walk goes on after an interruption."""
        return self.index == 0 and self.block > 0 and not self.resumed

    def moment(self, *, normalized: bool) -> Tensor:
        """Second moment of the stream here (D, D), as it is or as the norm leaves it; of the texts, without padding."""
        moment = SecondMoment(self.width, self.streams.device)
        for batch in (batch for batch in self.activations if batch.group != BESIDE_GROUP):
            hidden = batch.hidden
            moment.add(batch.rows(normalize(hidden, self.eps) if normalized else hidden))
        return moment.matrix

    def update(self, batch: Activations, hidden: Tensor) -> Tensor:
        """Return the sublayers' output here for a stream (B, T, D) of a batch."""
        return self.layer.update(self.index, self.layer.normalize(self.index, hidden), **batch.kwargs[self.block])

    def pass_on(self, batch: Activations, hidden: Tensor) -> Tensor:
        """Let a stream (B, T, D) of a batch pass the sublayers here."""
        return self.layer.pass_on(self.index, hidden + self.update(batch, hidden))

    def project(self, basis: Tensor) -> None:
        """Keep only the part of the stream in the span of a basis (D, width), in the same coordinates."""
        projector = basis @ basis.T
        for batch in self.activations:
            hidden = batch.hidden
            batch.put(hidden @ projector.to(hidden.dtype))


Observer = Callable[[int, Sublayer, Activations, Mapping[str, Any]], None]
"""Function that takes the number of a block, a sublayer, a batch before it, and the inputs of `Sublayer.observed`
modules by name: inputs of writers (B, T, n), arguments of experts."""


class Stream:
    """The canonical dense model, of which one block at a time has weights.

    Everything before the first layer (embeddings, masks, rotary angles) is transformers' own code, recorded by
    layers that do nothing.
    """

    def __init__(self, dense: DenseModel, dtype: torch.dtype, offload: Offload | None = None) -> None:
        """Prepare to run blocks.

        Args:
            dense: The dense model.
            dtype: The dtype of the forward pass.
            offload: Where activations live between blocks; None is the device.
        """
        self.dense, self.device, self.dtype = dense, dense.device, dtype
        self.offload = offload or Offload("device", dense.device)
        self._runner = BlockRunner(canonical_config(dense.anatomy), dense.table.layers, self.device, dtype)
        self._inner, self._layers = self._runner.model, self._runner.layers
        self._sites = dense.anatomy.sites

    def _embed(self, batches: list[Batch], streams: OffloadedTensors) -> list[Activations]:
        embeddings = self.dense.embeddings()
        self._runner.assign(self._inner, ((name, rows.to(self.dtype)) for name, rows in embeddings.items()))
        parent, _, leaf = self.dense.table.layers.rpartition(".")
        recorders = [CallRecorder(layer) for layer in self._layers]
        setattr(self._inner.get_submodule(parent), leaf, nn.ModuleList(recorders))
        shared: dict[torch.Size, list[dict[str, Any]]] = {}
        unnormed = self.offload.tensors()
        result = []
        for number, batch in enumerate(batches):
            ids = batch.input_ids.to(self.device)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(self.device)
            with self._runs("what is before the blocks"):
                self._inner.get_submodule(parent)(input_ids=ids, attention_mask=mask, use_cache=False)
            kwargs = [recorder.kwargs for recorder in recorders]
            if mask is None:  # the same for all batches of this shape
                kwargs = shared.setdefault(ids.shape, kwargs)
            hidden = recorders[0].hidden
            assert hidden is not None  # the model has called its first layer
            streams.append(hidden)
            counted = None if mask is None else mask.bool()
            result.append(Activations(streams, number, counted, kwargs, batch.group, unnormed))
        setattr(self._inner.get_submodule(parent), leaf, self._layers)
        for module in self.dense.table.embeddings:
            self._runner.release(self._inner.get_submodule(module))
        return result

    def walk(
        self,
        batches: list[Batch],
        observe: Observer | None = None,
        observed: Collection[Sublayer] = (),
        *,
        position: Position | None = None,
        hold: bool = False,
        unnormed: bool = False,
    ) -> Iterator[Site]:
        """Yield the stream at each site, the last one before the head, and run the sublayers in between.

        Each block runs once; the next one is read meanwhile. The consumer may change the activations at a site. Memory
        of a finished block goes back to the system, so that the next blocks take no more.

        Args:
            batches: The sequences.
            observe: Called for each batch with the input of an observed sublayer's writer, or of its experts.
            observed: Sublayers with one writer, or with experts (in the layers that have them).
            position: The position to go on from, with the streams saved as `STREAMS`; None begins with the embeddings.
            hold: True to keep a block's weights in memory, in float64's precision, while the stream passes it.
            unnormed: True to keep the input of each post norm until the next post norm.

        Raises:
            ActivationError: NaN or infinite numbers; says in which block.
        """
        dense, start = self.dense, position.block if position else 0
        width, eps, blocks = dense.anatomy.width, dense.anatomy.eps, dense.anatomy.block_count
        with torch.no_grad(), ThreadPoolExecutor(1) as reader:
            following = reader.submit(dense.read_block, start) if start < blocks else None
            streams = self.offload.tensors()
            activations = self._embed(batches, streams)
            self._check([self._finite(batch, batch.hidden) for batch in activations], "the embeddings give")
            if position:
                position.restore(STREAMS, streams)
            for block in range(start, blocks):
                assert following is not None
                folded, layer = dense.block(block, following.result()), self._layers[block]
                following = None
                self._runner.assign(layer, dense.as_modules(folded.items(), width))
                weights = folded if hold else None
                del folded
                for site in range(len(layer.sites)):
                    resumed = position is not None and block == start and site == 0
                    yield Site(block, site, layer, weights, activations, streams, width, eps, resumed)
                    if site == 0 and block + 1 < blocks:  # not before: the consumer may need memory, too
                        following = reader.submit(dense.read_block, block + 1)
                    trim_memory()
                    finite = [
                        self._pass(layer, block, site, batch, observe, observed, unnormed=unnormed)
                        for batch in activations
                    ]
                self._runner.release(layer)
                trim_memory()
                self._check(finite, f"block {block} (of 0 to {blocks - 1}) gives")
            yield Site(blocks, 0, None, None, activations, streams, width, eps, start == blocks)

    def _pass(
        self,
        layer: Any,
        block: int,
        site: int,
        batch: Activations,
        observe: Observer | None,
        observed: Collection[Sublayer],
        *,
        unnormed: bool,
    ) -> Tensor:
        """Let one batch pass a site's sublayers, and return whether it is finite then, a boolean on the device."""
        seen = [s for s in self._sites[site] if observe is not None and s in observed]
        seen = [s for s in seen if has_module(layer, s.experts if s.stacked else s.neuron_writer)]
        hidden = batch.hidden
        post_norms = [s.post_norm for s in self._sites[site] if s.post_norm and unnormed]
        modules = dict.fromkeys([*(name for s in seen for name in s.observed), *post_norms])
        with (
            captured_inputs(layer, list(modules)) as inputs,
            self._runs(f"block {block}"),
        ):
            update = layer.update(site, layer.normalize(site, hidden), **batch.kwargs[block])
        if observe is not None:
            for sublayer in seen:
                observe(block, sublayer, batch, inputs)
        for post_norm in post_norms:
            batch.keep_unnormed(inputs[post_norm])
        hidden = layer.pass_on(site, hidden + update)
        batch.put(hidden)
        last = site == len(self._sites) - 1  # NaN and infinity stay: it is enough to look at the end of a block
        return self._finite(batch, hidden) if last else torch.tensor(True, device=self.device)

    @contextmanager
    def _runs(self, part: str) -> Iterator[None]:
        """Translate errors of transformers' modules: some configs can be built, and not run.

        Raises:
            CheckpointError: instead.
        """
        try:
            yield
        except (EigensliceError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "memory" in str(error):  # of the CPU
                raise
            raise CheckpointError(
                f"transformers can't run {part} of {self.dense.source.name} ({first_line(error)})",
                allowed="a checkpoint that transformers runs",
                next_step="check config.json; `eigenslice eval` shows whether transformers runs the model",
            ) from error

    def _finite(self, batch: Activations, hidden: Tensor) -> Tensor:
        return all_finite(hidden if batch.mask is None else hidden[batch.mask])

    def _check(self, finite: list[Tensor], where: str) -> None:
        """Refuse infinite numbers and NaN. Called once a block, because it waits for a GPU."""
        if finite and not bool(torch.stack(finite).all()):
            raise ActivationError(
                f"{where} NaN or infinite activations in {str(self.dtype).removeprefix('torch.')}",
                allowed="finite numbers",
                next_step="check the checkpoint's weights; if they are finite, run with --compute-dtype float32",
            )
