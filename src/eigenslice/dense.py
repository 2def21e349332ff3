"""The dense model in canonical form, read one block at a time.

Canonical: every norm is an RMSNorm without gain (gains and shifts are folded into the readers), and in a
LayerNorm model every writer is centred, so that an RMSNorm does what the LayerNorm did. In this form all
architectures are alike: x <- x + sublayer(RMSN(x)).
"""

import re
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

    def _weight(self, module: str) -> Tensor:
        tensor = self.raw(module + ".weight")
        assert tensor is not None, module  # shapes were checked against transformers' model
        return tensor

    def final_gain(self) -> Tensor:
        """The final norm's gain (D,)."""
        gain = self.raw(self.table.final_norm + ".weight")
        return torch.ones(self.width, dtype=torch.float64, device=self.device) if gain is None else gain

    def embeddings(self, centre: bool = True) -> Tensors:
        """Weights of the token embedding and of learned positions, centred in a LayerNorm model.

        Args:
            centre: False leaves the token embedding as stored, for a tied head.
        """
        tensors = {}
        for index, module in enumerate(self.table.embeddings):
            weight = self._weight(module)
            tensors[module + ".weight"] = centre_rows(weight) if self.layer_norm and (centre or index > 0) else weight
        return tensors

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (V, D) and bias (V,) with the final norm folded in."""
        weight = self._weight(self.table.embeddings[0] if self.tied else self.table.head)
        bias = self.raw(self.table.head + ".bias")
        shift = self.raw(self.table.final_norm + ".bias")
        return fold_into_reader(weight, bias, self.final_gain(), shift)

    def read_block(self, index: int) -> Tensors:
        """Weights of one decoder layer as they are stored, in memory; names relative to the layer."""
        prefix = f"{self.table.layers}.{index}."
        return {
            name.removeprefix(prefix): self.source.weights.load(self._names[name])
            for name in self.shapes
            if name.startswith(prefix)
        }

    def block(self, index: int, stored: Tensors | None = None) -> Tensors:
        """Weights of one decoder layer, folded, in float64 on the device; names relative to the layer.

        Args:
            index: Number of the layer.
            stored: What `read_block` gave; None reads it.
        """
        stored = self.read_block(index) if stored is None else stored
        return fold_block(self.table, {n: t.to(device=self.device, dtype=torch.float64) for n, t in stored.items()})


def fold_block(table: Table, raw: Tensors) -> Tensors:
    """Fold the norms of one decoder layer.

    Args:
        table: Its architecture.
        raw: All its parameters, names relative to the layer, float64.

    Raises:
        UnsupportedModelError: the table doesn't account for a parameter.
    """
    folded: Tensors = {}
    for sublayer in (table.attention, table.mlp):
        gain, shift = raw.get(sublayer.norm + ".weight"), raw.get(sublayer.norm + ".bias")
        for module in sublayer.readers:
            weight, bias = fold_into_reader(raw[module + ".weight"], raw.get(module + ".bias"), gain, shift)
            folded |= {module + ".weight": weight} | ({} if bias is None else {module + ".bias": bias})
        for module in sublayer.writers:
            weight, bias = raw[module + ".weight"], raw.get(module + ".bias")
            if table.norm == "layer":
                weight, bias = centre_writer(weight), None if bias is None else centre_rows(bias)
            folded |= {module + ".weight": weight} | ({} if bias is None else {module + ".bias": bias})
        inner = tuple(module + "." for module in sublayer.inner)
        folded |= {name: tensor for name, tensor in raw.items() if name.startswith(inner)} if inner else {}
    norms = {f"{s.norm}.{kind}" for s in (table.attention, table.mlp) for kind in ("weight", "bias")}
    unknown = set(raw) - set(folded) - norms
    if unknown:
        raise UnsupportedModelError(
            f"a decoder layer has parameters that the table of {table.model_type!r} doesn't know: {sorted(unknown)}",
            allowed="layers of which every parameter is known to read or write the residual stream, or neither",
            next_step="report this model: the table has to be extended",
        )
    return folded
