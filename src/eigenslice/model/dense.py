"""The dense model in canonical form, read one block at a time.

Canonical: every norm is an RMSNorm without gain (gains and shifts are folded into the readers), and in a
LayerNorm model every writer is centred, so that an RMSNorm does what the LayerNorm did. In this form all
architectures are alike: x <- x + sublayer(RMSN(x)).
"""

import re
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
from eigenslice.model.dtypes import Counts, count_dtypes, describe, prevailing, short_name
from eigenslice.model.folding import FoldedBlock, carry, gain_of
from eigenslice.model.rows import ROWS, Rows

Tensors = dict[str, Tensor]
NamedTensors = Iterable[tuple[str, Tensor]]


class DenseModel:
    """A dense checkpoint's weights, checked against transformers' model, folded on request.

    Attributes:
        source, table, config: The checkpoint, its table and its transformers config.
        shapes: Shape of every stored parameter by transformers' name; a tied head isn't stored.
        device: Where folding is computed (in float64).
        neuron_count: Number of neurons in each MLP, or in each expert; 0 if the table doesn't say that they can be cut.
        expert_count: Number of experts in each mixture; 0 if there are none, or their neurons can't be cut.
        shared_neuron_count: Number of neurons in the shared experts that are cut with them; 0 if there are none.
        kv_head_count: Number of key/value heads in each block; 0 if the table doesn't say that they can be cut.
        in_float32: Last parts of the names of tensors that transformers keeps in float32 beside 16-bit weights.
        sinusoids: Tables of positions that no checkpoint holds, (positions, D).
        dtype: That the checkpoint is stored in; where several are, see `prevailing`.
    """

    def __init__(self, source: Source, device: torch.device | str = "cpu") -> None:
        """Raises CheckpointError where weights are missing, unknown, of a wrong shape or not floats."""
        self.source, self.config, self.device = source, source.config, torch.device(device)
        self.table: Table = lookup(source.config)
        model = empty_model(source.config)
        self.shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        self._origins = origins(source, model)
        self._check()
        self.tied = self._is_tied()
        if self.tied:
            del self.shapes[self.table.lm_head + ".weight"]
        self.width = self.shapes[self.table.embeddings[0] + ".weight"][1]
        self.block_count = int(self.config.num_hidden_layers)
        self.eps = self.table.epsilon(self.config)
        self.layer_norm = self.table.norm == "layer"
        *experts, self.neuron_count = self._columns(self.table.mlp.neuron_writer)
        self.expert_count = experts[0] if experts else 0
        self.shared_neuron_count = self._columns(self.table.mlp.shared_writer)[-1]
        self.kv_head_count = self._count_heads()
        self.sinusoids = self._fixed_positions(model)
        self.in_float32 = frozenset(model._keep_in_fp32_modules_strict or ())
        self.dtype = self._choose_dtype()

    def _check(self) -> None:
        weights = self.source.weights
        for name, origin in self._origins.items():
            try:
                shape = origin.shape(weights)
            except (RuntimeError, ValueError) as error:  # torch's and transformers' for parts that don't fit
                shape = str(error).strip().splitlines()[0]
            if shape != self.shapes[name]:
                raise CheckpointError(
                    f"{self.source.name}: {origin.stored[0]} is {shape}, the config says {self.shapes[name]}",
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
        """As transformers decides it: the config says so, and the two are not stored with different values."""
        ends = [self._origins[f"{module}.weight"] for module in (self.table.embeddings[0], self.table.lm_head)]
        if not self.config.tie_word_embeddings or ends[0].stored == ends[1].stored:
            return self.config.tie_word_embeddings
        embedding, head = (end.load(self.source.weights) for end in ends)
        return torch.equal(embedding, head)

    def _columns(self, writer: str | None) -> list[int]:
        """Neurons that an MLP's writer reads, behind the number of experts; 0 if there are none that can be cut."""
        mlp = self.table.mlp
        names = (
            [f"{self.table.layers}.{block}.{mlp.weight(writer)}" for block in range(self.block_count)] if writer else []
        )
        shape = next((self.shapes[name] for name in names if name in self.shapes), None)
        if not mlp.can_cut_neurons or writer is None or shape is None:
            return [0]
        *experts, _, neurons = mlp.transpose_shape(writer, shape)
        return [*experts, neurons]

    def _count_heads(self) -> int:
        if not self.table.attention.can_cut_heads:
            return 0
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def _fixed_positions(self, model: Any) -> Tensors:
        """The positions that transformers computes, by the name that they have where they are stored."""
        if not self.table.sinusoids:
            return {}
        positions = model.get_submodule(self.table.sinusoids)  # without memory, as all of this model
        weights = positions.get_embedding(*positions.weights.shape, positions.padding_idx)
        return {self.table.sinusoids + ".weights": weights.to(self.device, torch.float64)}

    @property
    def can_stay_tied(self) -> bool:
        """Whether one matrix can still be embedding and head when the norms are folded."""
        return self.tied and not self.table.embedding_norm and not self.carries_shifts

    @property
    def carries_shifts(self) -> bool:
        """Whether folded shifts reach experts without biases through the norm: see `as_modules`.

        The stream's coordinates have to sum to zero then, in every basis (`layer_norm_basis`).
        """
        return self.reader_bias and bool(self.table.mlp.stacked)

    def keeps_float32(self, name: str) -> bool:
        """Whether transformers keeps a tensor in float32 beside 16-bit weights."""
        return any(re.search(rf"(^|\.){part}($|\.)", name) for part in self.in_float32)

    def _count_dtypes(self, names: Iterable[str]) -> Counts:
        return count_dtypes(self.source.weights, (stored for name in names for stored in self._origins[name].stored))

    def _choose_dtype(self) -> torch.dtype:
        """The dtype of most parameters (see `prevailing`); warns where there are several."""
        blocks = (name for name in self.shapes if name.startswith(f"{self.table.layers}."))
        dtype = prevailing(self._count_dtypes(self.shapes), self._count_dtypes(blocks), self.config)
        usual = self._count_dtypes(name for name in self.shapes if not self.keeps_float32(name))
        if len(usual) > 1:
            warnings.warn(
                f"{self.source.name} stores {describe(usual)}: it is taken for a {short_name(dtype)} model, and so is "
                "its result (--dtype says otherwise).",
                EigensliceWarning,
                stacklevel=3,
            )
        return dtype

    @property
    def parameters(self) -> int:
        """Stored parameters, a tied head counted once."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def block_parameters(self) -> int:
        """Parameters of the first block."""
        return sum(torch.Size(self.shapes[name]).numel() for name in self._names_in(0).values())

    @property
    def blocks_alike(self) -> bool:
        """Whether blocks can be left out: the config has one number of them, and says nothing of single ones."""
        if self.table.numbered and getattr(self.config, self.table.numbered):
            return False
        parts = [{name: self.shapes[full] for name, full in self._names_in(n).items()} for n in range(self.block_count)]
        lists = [v for v in self.config.to_dict().values() if isinstance(v, list) and len(v) == self.block_count]
        return all(part == parts[0] for part in parts) and all(v.count(v[0]) == len(v) for v in lists)

    @property
    def neurons_per_block(self) -> tuple[int, ...]:
        """Number of MLP neurons in each block."""
        return (self.neuron_count,) * self.block_count

    @property
    def neuron_rows(self) -> int:
        """Rows of all that an MLP's neurons read by, in the first block; 0 where they aren't fitted."""
        mlp, names = self.table.mlp, self._names_in(0)
        if not mlp.can_cut_neurons or mlp.stacked:
            return 0
        weights = {name: self.shapes[names[mlp.weight(name)]] for name in mlp.readers if mlp.weight(name) in names}
        return sum(mlp.transpose_shape(name, shape)[0] for name, shape in weights.items())

    @property
    def reader_bias(self) -> bool:
        """Whether folding gives every reader a bias (the norms have a shift)."""
        return f"{self.table.final_norm}.bias" in self.shapes

    def keeps_bias(self, name: str, stock: bool) -> bool:
        """Whether a reader's bias is stored: if the dense model has it, or where it holds the norm's shift.

        Args:
            name: Of the bias.
            stock: In a class that has the dense model's biases only.
        """
        return name in self.shapes or (self.reader_bias and not stock)

    def as_modules(self, tensors: NamedTensors, width: int) -> NamedTensors:
        """Weights of a decoder layer as the custom class's modules hold them.

        Experts have no biases. Where the norm before them has a shift, the custom class's norm gives n + 1, n of sum
        zero; rows that sum to zero don't see the 1, and those that sum to b add b.

        Args:
            tensors: Out x in; names relative to the layer.
            width: Of the stream.
        """
        if not self.carries_shifts:
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
        return self._load(name).to(device=self.device, dtype=torch.float64)

    def _load(self, name: str) -> Tensor:
        return self._origins[name].load(self.source.weights)

    def final_gain(self) -> Tensor:
        """The final norm's gain (D,)."""
        weight = self.raw(self.table.final_norm + ".weight")
        if weight is None:
            return torch.ones(self.width, dtype=torch.float64, device=self.device)
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
                changes.append(partial(layer_norm, gain=gain, shift=shift, eps=self.eps))
            if self.layer_norm and (centre or index > 0):
                changes.append(centre_rows)
            result[module + ".weight"] = self._rows(module + ".weight", *changes)
        for name, rows in self.sinusoids.items():
            changes = (centre_rows,) if self.layer_norm else ()
            result[name] = Rows(partial(torch.split, rows, ROWS), len(rows), self.device, changes)
        return result

    def lm_head(self) -> tuple["Rows", Tensor | None]:
        """The head's weight (V, D) and bias (V,) with the final norm folded in."""
        name = (self.table.embeddings[0] if self.tied else self.table.lm_head) + ".weight"
        bias, shift = self.raw(self.table.lm_head + ".bias"), self.raw(self.table.final_norm + ".bias")
        if shift is not None:
            shifted = self._rows(name).map(lambda rows: (rows @ shift)[:, None], torch.float64)[:, 0]
            bias = shifted if bias is None else bias + shifted
        gain = self.final_gain()
        return self._rows(name, lambda rows: rows * gain), bias

    def _rows(self, name: str, *changes: Callable[[Tensor], Tensor]) -> "Rows":
        origin = self._origins[name]
        return Rows(lambda: origin.rows(self.source.weights, ROWS), self.shapes[name][0], self.device, changes)

    def read_block(self, index: int) -> Tensors:
        """Weights of one decoder layer as they are stored, in memory; names relative to the layer."""
        return {name: self._load(full) for name, full in self._names_in(index).items()}

    def _names_in(self, index: int) -> dict[str, str]:
        """Full names of a decoder layer's parameters, by those relative to the layer."""
        prefix = f"{self.table.layers}.{index}."
        return {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}

    def block(self, index: int, stored: Tensors | None = None) -> FoldedBlock:
        """Weights of one decoder layer, folded.

        Args:
            index: Number of the layer.
            stored: What `read_block` gave; None reads each when it is asked for.
        """
        scale = float(getattr(self.config, self.table.residual_scale)) if self.table.residual_scale else 1.0
        names = self._names_in(index)
        load = (lambda name: self._load(names[name])) if stored is None else stored.__getitem__
        return FoldedBlock(self.table, names.keys(), load, self.device, scale)
