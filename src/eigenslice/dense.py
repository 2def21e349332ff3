"""The dense model in canonical form, read one block at a time.

Canonical: every norm is an RMSNorm without gain (gains and shifts are folded into the readers), and in a
LayerNorm model every writer is centred, so that an RMSNorm does what the LayerNorm did. In this form all
architectures are alike: x <- x + sublayer(RMSN(x)).
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from eigenslice.algebra.norms import centre_rows, centre_writer, fold_into_reader
from eigenslice.arch import Table, lookup
from eigenslice.checkpoint.source import Source
from eigenslice.errors import CheckpointError, UnsupportedModelError
from eigenslice.skeleton import empty_model

Tensors = dict[str, Tensor]
ROWS = 4096
"""Rows of an embedding or a head that are in float64 at once."""

# Buffers that older versions of transformers stored beside the weights.
LEFTOVERS = re.compile(r"(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)$")


def _checkpoint_names(source: Source, model: Any) -> dict[str, str]:
    """Map the names of a model's parameters to the names of a checkpoint's tensors; every tensor has to fit."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    names, unknown = {}, []
    for stored in source.weights.names():
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if name in state and converter is None:
            names[name] = stored
        elif not LEFTOVERS.search(stored):
            unknown.append(stored)
    table = lookup(source.config)
    ends = [table.embeddings[0] + ".weight", table.head + ".weight"]
    if source.config.tie_word_embeddings and any(name in names for name in ends):
        # Checkpoints of tied models hold the embedding, the head, or both
        present = next(name for name in ends if name in names)
        for name in ends:
            names.setdefault(name, names[present])
    missing = sorted(set(state) - set(names))
    if missing or unknown:
        found = [f"lacks {len(missing)} tensors ({', '.join(missing[:3])})"] if missing else []
        found += [f"has {len(unknown)} unknown ones ({', '.join(sorted(unknown)[:3])})"] if unknown else []
        raise CheckpointError(
            f"{source.name} {' and '.join(found)}",
            allowed=f"exactly the weights of transformers' {type(model).__name__}",
            next_step="download or save the checkpoint again; merge adapters into the weights first",
        )
    return names


class DenseModel:
    """A dense checkpoint's weights, checked against transformers' model, folded on request.

    Attributes:
        source, table, config: The checkpoint, its table and its transformers config.
        shapes: Shape of every stored parameter by transformers' name; a tied head isn't stored.
        device: Where folding is computed (in float64).
        neurons: Number of neurons in each MLP; 0 if the table doesn't say that they can be cut.
    """

    def __init__(self, source: Source, device: torch.device | str = "cpu") -> None:
        """Raises CheckpointError where weights are missing, unknown, of a wrong shape or not floats."""
        self.source, self.config, self.device = source, source.config, torch.device(device)
        self.table: Table = lookup(source.config)
        model = empty_model(source.config)
        self.shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        self._names = _checkpoint_names(source, model)
        self._check()
        self.tied = self._is_tied()
        if self.tied:
            del self.shapes[self.table.head + ".weight"]
        self.width = self.shapes[self.table.embeddings[0] + ".weight"][1]
        self.blocks = int(self.config.num_hidden_layers)
        self.eps = self.table.epsilon(self.config)
        self.layer_norm = self.table.norm == "layer"
        self.neurons = int(getattr(self.config, self.table.mlp.neurons)) if self.table.mlp.neurons else 0

    def _check(self) -> None:
        weights = self.source.weights
        for name, stored in self._names.items():
            if weights.shape(stored) != self.shapes[name]:
                raise CheckpointError(
                    f"{self.source.name}: {stored} is {weights.shape(stored)}, the config says {self.shapes[name]}",
                    allowed="weights that fit the config",
                    next_step="check that config.json and the weights belong together",
                )
            if weights.dtype(stored) is None:
                raise CheckpointError(
                    f"{self.source.name}: {stored} is stored as integers or 8-bit floats",
                    allowed="float32, float16 or bfloat16 weights",
                    next_step="slice the unquantized checkpoint and quantize the result",
                )

    def _is_tied(self) -> bool:
        """As transformers decides it: the config says so, and the two are not stored with different values."""
        names = [self._names[f"{module}.weight"] for module in (self.table.embeddings[0], self.table.head)]
        if not self.config.tie_word_embeddings or names[0] == names[1]:
            return self.config.tie_word_embeddings
        embedding, head = (self.source.weights.load(name) for name in names)
        return torch.equal(embedding, head)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint's embedding is stored in."""
        dtype = self.source.weights.dtype(self._names[self.table.embeddings[0] + ".weight"])
        assert dtype is not None  # checked in __init__
        return dtype

    @property
    def parameters(self) -> int:
        """Stored parameters, a tied head counted once."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def all_neurons(self) -> tuple[int, ...]:
        """Number of MLP neurons in each block."""
        return (self.neurons,) * self.blocks

    @property
    def reader_bias(self) -> bool:
        """Whether folding gives every reader a bias (the norms have a shift)."""
        return f"{self.table.final_norm}.bias" in self.shapes

    @property
    def head_bias(self) -> bool:
        """Whether the folded head has a bias."""
        return self.reader_bias or f"{self.table.head}.bias" in self.shapes

    def raw(self, name: str) -> Tensor | None:
        """A tensor as stored, in float64 on the device; None if the model has none of this name."""
        if name not in self._names:
            return None
        return self.source.weights.load(self._names[name]).to(device=self.device, dtype=torch.float64)

    def _stored(self, name: str) -> Tensor:
        return self.source.weights.load(self._names[name])

    def final_gain(self) -> Tensor:
        """The final norm's gain (D,)."""
        gain = self.raw(self.table.final_norm + ".weight")
        return torch.ones(self.width, dtype=torch.float64, device=self.device) if gain is None else gain

    def embeddings(self, centre: bool = True) -> "dict[str, Rows]":
        """Weights of the token embedding and of learned positions, centred in a LayerNorm model.

        Args:
            centre: False leaves the token embedding as stored, for a tied head.
        """
        rows = {}
        for index, module in enumerate(self.table.embeddings):
            name = module + ".weight"
            centred = self.layer_norm and (centre or index > 0)
            rows[name] = self._rows(name, centre_rows if centred else None)
        return rows

    def head(self) -> tuple["Rows", Tensor | None]:
        """The head's weight (V, D) and bias (V,) with the final norm folded in."""
        name = (self.table.embeddings[0] if self.tied else self.table.head) + ".weight"
        bias, shift = self.raw(self.table.head + ".bias"), self.raw(self.table.final_norm + ".bias")
        if shift is not None:
            shifted = self._rows(name).map(lambda rows: (rows @ shift)[:, None], torch.float64)[:, 0]
            bias = shifted if bias is None else bias + shifted
        gain = self.final_gain()
        return self._rows(name, lambda rows: rows * gain), bias

    def _rows(self, name: str, change: Callable[[Tensor], Tensor] | None = None) -> "Rows":
        stored = self._names[name]
        return Rows(
            lambda: self.source.weights.rows(stored, ROWS), self.source.weights.shape(stored)[0], self.device, change
        )

    def read_block(self, index: int) -> Tensors:
        """Weights of one decoder layer as they are stored, in memory; names relative to the layer."""
        prefix = f"{self.table.layers}.{index}."
        return {
            name.removeprefix(prefix): self.source.weights.load(self._names[name])
            for name in self.shapes
            if name.startswith(prefix)
        }

    def block(self, index: int, stored: Tensors | None = None) -> "FoldedBlock":
        """Weights of one decoder layer, folded.

        Args:
            index: Number of the layer.
            stored: What `read_block` gave; None reads each when it is asked for.
        """
        if stored is not None:
            return FoldedBlock(self.table, stored.keys(), stored.__getitem__, self.device)
        prefix = f"{self.table.layers}.{index}."
        names = {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}
        return FoldedBlock(self.table, names.keys(), lambda name: self._stored(names[name]), self.device)


@dataclass(frozen=True)
class Rows:
    """A matrix with a row for each token, read and changed a few thousand rows at a time.

    Attributes:
        pieces: Reads it, (n, D) at a time, as the checkpoint has it.
        count: Number of rows.
        device: Where it is changed, in float64.
        change: From rows (n, D) to rows (n, D); None leaves them as they are.
    """

    pieces: Callable[[], Iterator[Tensor]]
    count: int
    device: torch.device
    change: Callable[[Tensor], Tensor] | None = None

    def map(self, then: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """All rows, changed by `change` and then by `then`, from (n, D) to (n, m); (V, m) of a dtype on the device."""
        result = torch.empty(0)
        start = 0
        for piece in self.pieces():
            rows = piece.to(device=self.device, dtype=torch.float64)
            rows = then(rows if self.change is None else self.change(rows))
            if start == 0:
                result = torch.empty(self.count, rows.shape[1], dtype=dtype, device=self.device)
            result[start : start + len(rows)] = rows
            start += len(rows)
        return result

    def to(self, dtype: torch.dtype) -> Tensor:
        """All rows, changed."""
        return self.map(lambda rows: rows, dtype)


class FoldedBlock(Mapping[str, Tensor]):
    """Canonical weights of one decoder layer, in float64 on the device; names are relative to the layer.

    Each is folded when it is asked for, and not kept.
    """

    def __init__(
        self, table: Table, stored: Collection[str], load: Callable[[str], Tensor], device: torch.device
    ) -> None:
        """Nothing is loaded yet.

        Args:
            table: The layer's architecture.
            stored: Names of all its parameters.
            load: Gives one of them.
            device: Where they are folded.

        Raises:
            UnsupportedModelError: the table doesn't account for one of them.
        """
        self._stored, self._load = frozenset(stored), load
        self._device, self._centred = device, table.norm == "layer"
        self._norms: dict[str, str] = {}  # the norm before each reader
        self._names: list[str] = []
        writers: set[str] = set()
        for sublayer in (table.attention, table.mlp):
            shift = f"{sublayer.norm}.bias" in stored
            for module in sublayer.readers:
                self._norms[module] = sublayer.norm
                self._names += [
                    f"{module}.weight",
                    *([f"{module}.bias"] if shift or f"{module}.bias" in stored else []),
                ]
            for module in sublayer.writers:
                self._names += [name for name in (f"{module}.weight", f"{module}.bias") if name in stored]
            writers |= set(sublayer.writers)
            inner = tuple(module + "." for module in sublayer.inner)
            self._names += [name for name in stored if inner and name.startswith(inner)]
        self._writers = frozenset(writers)
        norms = {f"{s.norm}.{kind}" for s in (table.attention, table.mlp) for kind in ("weight", "bias")}
        unknown = set(stored) - set(self._names) - norms
        if unknown:
            raise UnsupportedModelError(
                f"a decoder layer has parameters that the table of {table.model_type!r} doesn't know: "
                f"{sorted(unknown)}",
                allowed="layers of which every parameter is known to read or write the residual stream, or neither",
                next_step="report this model: the table has to be extended",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        module, _, kind = name.rpartition(".")
        if module in self._norms:
            return self._fold(module, self._norms[module], kind)
        tensor = self._raw(name)
        assert tensor is not None  # it is among the names
        if self._centred and module in self._writers:
            return centre_writer(tensor) if kind == "weight" else centre_rows(tensor)
        return tensor

    def _raw(self, name: str) -> Tensor | None:
        return self._load(name).to(device=self._device, dtype=torch.float64) if name in self._stored else None

    def _fold(self, module: str, norm: str, kind: str) -> Tensor:
        """A reader's weight with the norm's gain in it, or its bias with the norm's shift in it."""
        if kind == "weight":
            weight, gain = self._raw(f"{module}.weight"), self._raw(f"{norm}.weight")
            assert weight is not None
            return fold_into_reader(weight, None, gain, None)[0]
        bias, shift = self._raw(f"{module}.bias"), self._raw(f"{norm}.bias")
        if shift is None:
            assert bias is not None
            return bias
        weight = self._raw(f"{module}.weight")
        assert weight is not None
        folded = fold_into_reader(weight, bias, None, shift)[1]
        assert folded is not None
        return folded
