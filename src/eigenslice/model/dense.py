"""The dense model in canonical form, read one block at a time.

In the canonical form every norm is an RMSNorm without gain: gains and shifts are folded into the readers. In a
LayerNorm model every writer is centred, too, so that an RMSNorm gives the same as the LayerNorm. In this form all
architectures are alike: x <- x + sublayer(RMSN(x)).
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.norms import centre_rows, layer_norm
from eigenslice.arch import Table, lookup
from eigenslice.checkpoint.empty import empty_model
from eigenslice.checkpoint.mapping import origins
from eigenslice.checkpoint.source import Source
from eigenslice.errors import CheckpointError, EigensliceWarning
from eigenslice.model.anatomy import Anatomy, Shape, parameter_shapes
from eigenslice.model.dtypes import Counts, count_dtypes, describe, prevailing, short_name
from eigenslice.model.folding import FoldedBlock, carry, gain_of
from eigenslice.model.rows import ROWS, Rows
from eigenslice.runtime.device import moved

Tensors = dict[str, Tensor]
NamedTensors = Iterable[tuple[str, Tensor]]


class DenseModel:
    """A dense checkpoint's weights, checked against transformers' model, folded on request.

    Attributes:
        source, table, config: The checkpoint, its table and its transformers config.
        anatomy: Sizes, sites and ties: all facts that need no weights.
        device: The device of folding, which is computed in float64.
        sinusoids: Tables of positions that no checkpoint holds, (positions, D).
        dtype: The dtype of the checkpoint; for mixed dtypes see `prevailing`.
    """

    def __init__(self, source: Source, device: torch.device | str = "cpu") -> None:
        """Raises CheckpointError where weights are missing, unknown, of a wrong shape or not floats."""
        self.source, self.config, self.device = source, source.config, torch.device(device)
        self.table: Table = lookup(source.config)
        model = empty_model(source.config)
        self._origins = origins(source, model)
        self._check(parameter_shapes(model))
        self.anatomy = Anatomy.of_model(source.config, model, tied=self._is_tied(), dropped_tokens=source.dropped_rows)
        self.sinusoids = self._fixed_positions(model)
        self.dtype = self._choose_dtype()

    def _check(self, shapes: dict[str, Shape]) -> None:
        weights = self.source.weights
        for name, origin in self._origins.items():
            try:
                shape = origin.shape(weights)
            except (RuntimeError, ValueError) as error:  # torch's and transformers' for parts that don't fit
                shape = str(error).strip().splitlines()[0]
            if shape != shapes[name]:
                raise CheckpointError(
                    f"{self.source.name}: {origin.stored[0]} is {shape}, the config says {shapes[name]}",
                    allowed="weights that fit the config",
                    next_step="check that config.json and the weights belong together",
                )
            if origin.dtype(weights) is None:
                raise CheckpointError(
                    f"{self.source.name}: {origin.stored[0]} is stored as integers or 8-bit floats",
                    allowed="float32, float16 or bfloat16 weights",
                    next_step="slice the unquantized checkpoint and quantize the result",
                )

    def _is_tied(self) -> bool:
        """Return whether embedding and head are tied: the config says so, and their stored values are equal."""
        ends = [self._origins[f"{module}.weight"] for module in (self.table.embeddings[0], self.table.lm_head)]
        if not self.config.tie_word_embeddings or ends[0].stored == ends[1].stored:
            return self.config.tie_word_embeddings
        embedding, head = (end.load(self.source.weights) for end in ends)
        return torch.equal(embedding, head)

    def _fixed_positions(self, model: Any) -> Tensors:
        """The positions that transformers computes, by the name that they have where they are stored."""
        if not self.table.sinusoids:
            return {}
        positions = model.get_submodule(self.table.sinusoids)  # without memory, as all of this model
        weights = positions.get_embedding(*positions.weights.shape, positions.padding_idx)
        return {self.table.sinusoids + ".weights": moved(weights, self.device, torch.float64)}

    def _count_dtypes(self, names: Iterable[str]) -> Counts:
        return count_dtypes(self.source.weights, (stored for name in names for stored in self._origins[name].stored))

    def _choose_dtype(self) -> torch.dtype:
        """The dtype of most parameters (see `prevailing`); warns where there are several."""
        blocks = (name for name in self.anatomy.shapes if name.startswith(f"{self.table.layers}."))
        dtype = prevailing(self._count_dtypes(self.anatomy.shapes), self._count_dtypes(blocks), self.config)
        usual = self._count_dtypes(name for name in self.anatomy.shapes if not self.anatomy.keeps_float32(name))
        if len(usual) > 1:
            warnings.warn(
                f"{self.source.name} stores {describe(usual)}: it is taken for a {short_name(dtype)} model, and so is "
                "its result (--dtype says otherwise).",
                EigensliceWarning,
                stacklevel=3,
            )
        return dtype

    @property
    def running_dtype(self) -> torch.dtype:
        """The dtype of the forward pass, unless the user says otherwise: float32 on a CPU, the checkpoint's on a GPU.

        Tensors of a GGUF are dequantized to float32, which says nothing about the precision that they had.
        """
        if self.device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if self.source.gguf else self.dtype

    def as_modules(self, tensors: NamedTensors, width: int) -> NamedTensors:
        """Return weights of a decoder layer as the custom class's modules hold them.

        Experts have no biases. If the norm before them has a shift, the custom class's norm gives n + 1, and n has sum
        zero. Rows that sum to zero don't see the 1. Rows that sum to b add b.

        Args:
            tensors: Weights, out x in; names relative to the layer.
            width: Width of the stream.
        """
        if not self.anatomy.carries_shifts:
            return (pair for named in tensors for pair in self.table.transpose(dict([named])).items())
        mlp, result = self.table.mlp, dict(tensors)
        for name in mlp.readers:
            bias = result.pop(mlp.bias(name), None)
            if bias is not None:
                result[mlp.weight(name)] = carry(result[mlp.weight(name)], bias)
        return self.table.transpose(result).items()

    def raw(self, name: str) -> Tensor | None:
        """A tensor as the model has it, in float64 on the device; None if the model has none of this name."""
        if name not in self._origins:
            return None
        return moved(self._load(name), self.device, torch.float64)

    def _load(self, name: str) -> Tensor:
        return self._origins[name].load(self.source.weights)

    def final_gain(self) -> Tensor:
        """The final norm's gain (D,)."""
        weight = self.raw(self.table.final_norm + ".weight")
        if weight is None:
            return torch.ones(self.anatomy.width, dtype=torch.float64, device=self.device)
        return gain_of(self.table, weight)

    def embeddings(self, centre: bool = True) -> "dict[str, Rows]":
        """Weights of the token embedding and of positions, centred in a LayerNorm model.

        Args:
            centre: False leaves the token embedding as stored, for a tied head.
        """
        result: dict[str, Rows] = {}
        for index, module in enumerate(self.table.embeddings):
            changes = []
            if index == 0 and self.table.embedding_norm:
                gain, shift = (self.raw(f"{self.table.embedding_norm}.{kind}") for kind in ("weight", "bias"))
                assert gain is not None  # shapes were checked against transformers' model
                changes.append(partial(layer_norm, gain=gain, shift=shift, eps=self.anatomy.eps))
            if self.anatomy.layer_norm and (centre or index > 0):
                changes.append(centre_rows)
            result[module + ".weight"] = self._rows(module + ".weight", *changes)
        for name, rows in self.sinusoids.items():
            changes = (centre_rows,) if self.anatomy.layer_norm else ()
            result[name] = Rows(partial(torch.split, rows, ROWS), len(rows), self.device, changes)
        return result

    def lm_head(self) -> tuple["Rows", Tensor | None]:
        """The head's weight (V, D) and bias (V,) with the final norm folded in."""
        gain = self.final_gain()
        return self._rows(self._head, lambda rows: rows * gain), self._head_bias(self._rows(self._head).pieces())

    def stored_head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (V, D) as stored, in float32, and its bias (V,) with the final norm's shift folded in."""
        weight = self._rows(self._head).to(torch.float32)
        return weight, self._head_bias(weight.split(ROWS))

    def _head_bias(self, pieces: Iterable[Tensor]) -> Tensor | None:
        """The head's bias with the final norm's shift folded in, (V,).

        Args:
            pieces: The head's weight as it is stored, (n, D) at a time; read only if there is a shift.
        """
        bias, shift = self.raw(self.table.lm_head + ".bias"), self.raw(self.table.final_norm + ".bias")
        if shift is None:
            return bias
        shifted = torch.cat([moved(piece, self.device, torch.float64) @ shift for piece in pieces])
        return shifted if bias is None else bias + shifted

    @property
    def _head(self) -> str:
        """Name of the matrix that the head multiplies by."""
        return (self.table.embeddings[0] if self.anatomy.tied else self.table.lm_head) + ".weight"

    def _rows(self, name: str, *changes: Callable[[Tensor], Tensor]) -> "Rows":
        origin = self._origins[name]
        return Rows(lambda: origin.rows(self.source.weights, ROWS), self.anatomy.shapes[name][0], self.device, changes)

    def read_block(self, index: int) -> Tensors:
        """Weights of one decoder layer as they are stored, in memory; names relative to the layer."""
        return {name: self._load(full) for name, full in self.anatomy.names_in_block(index).items()}

    def block(self, index: int, stored: Tensors | None = None) -> FoldedBlock:
        """Weights of one decoder layer, folded.

        Args:
            index: Number of the layer.
            stored: The answer of `read_block`, which moves to the device once, as it is stored; None reads and moves
                each tensor when it is needed.
        """
        scale = float(getattr(self.config, self.table.residual_scale)) if self.table.residual_scale else 1.0
        names = self.anatomy.names_in_block(index)
        here = {} if stored is None else {name: tensor.to(self.device) for name, tensor in stored.items()}
        load = (lambda name: self._load(names[name])) if stored is None else here.__getitem__
        return FoldedBlock(self.table, names.keys(), load, self.device, scale)
