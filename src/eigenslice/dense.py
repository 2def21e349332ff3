"""The dense model in canonical form, read one block at a time.

Canonical: every norm is an RMSNorm without gain (gains and shifts are folded into the readers), and in a
LayerNorm model every writer is centred, so that an RMSNorm does what the LayerNorm did. In this form all
architectures are alike: x <- x + sublayer(RMSN(x)).
"""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from eigenslice.algebra.norms import centre_rows, centre_writer, fold_into_reader, layer_norm
from eigenslice.arch import Table, lookup
from eigenslice.checkpoint.mapping import origins
from eigenslice.checkpoint.source import Source
from eigenslice.errors import CheckpointError, UnsupportedModelError

Tensors = dict[str, Tensor]


def empty_model(config: Any) -> Any:
    """transformers' model of a config, with parameters on the meta device.

    Raises:
        CheckpointError: transformers can't build it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # whatever a model's constructor raises on a config that it doesn't expect
        raise CheckpointError(
            f"transformers can't build the {config.model_type} model that the config describes "
            f"({type(error).__name__}: {error})",
            allowed="a config of a model that transformers can build",
            next_step="check config.json",
        ) from error


class DenseModel:
    """A dense checkpoint's weights, checked against transformers' model, folded on request.

    Attributes:
        source, table, config: The checkpoint, its table and its transformers config.
        shapes: Shape of every stored parameter by transformers' name; a tied head isn't stored.
        device: Where folding is computed (in float64).
        neurons: Number of neurons in each MLP; 0 if the table doesn't say that they can be cut.
        in_float32: Last parts of the names of tensors that transformers keeps in float32 beside 16-bit weights.
        sinusoids: Tables of positions that no checkpoint holds, (positions, D).
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
            del self.shapes[self.table.head + ".weight"]
        self.width = self.shapes[self.table.embeddings[0] + ".weight"][1]
        self.blocks = int(self.config.num_hidden_layers)
        self.eps = self.table.epsilon(self.config)
        self.layer_norm = self.table.norm == "layer"
        self.neurons = self._count_neurons()
        self.sinusoids = self._fixed_positions(model)
        self.in_float32 = frozenset(model._keep_in_fp32_modules_strict or ())

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
        ends = [self._origins[f"{module}.weight"] for module in (self.table.embeddings[0], self.table.head)]
        if not self.config.tie_word_embeddings or ends[0].stored == ends[1].stored:
            return self.config.tie_word_embeddings
        embedding, head = (end.load(self.source.weights) for end in ends)
        return torch.equal(embedding, head)

    def _count_neurons(self) -> int:
        mlp = self.table.mlp
        if not mlp.neurons:
            return 0
        writer = f"{self.table.layers}.0.{mlp.weight(mlp.writers[0])}"
        return mlp.turn(mlp.writers[0], self.shapes[writer])[1]

    def _fixed_positions(self, model: Any) -> Tensors:
        """The positions that transformers computes, by the name that they have where they are stored."""
        if not self.table.sinusoids:
            return {}
        name = self.table.sinusoids + ".weights"
        return {name: model.get_submodule(self.table.sinusoids).weights.to(self.device, torch.float64)}

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint's embedding is stored in."""
        dtype = self._origins[self.table.embeddings[0] + ".weight"].dtype(self.source.weights)
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

    def keeps_bias(self, name: str, stock: bool) -> bool:
        """Whether a reader's bias is stored: if the dense model has it, or where it holds the norm's shift.

        Args:
            name: Of the bias.
            stock: In a class that has the dense model's biases only.
        """
        return name in self.shapes or (self.reader_bias and not stock)

    def as_modules(self, tensors: Tensors, width: int) -> Tensors:
        """Weights of a decoder layer as the custom class's modules hold them.

        Experts have no biases. Where the norm before them has a shift, the custom class's norm gives n + 1, n of sum
        zero; rows that sum to zero don't see the 1, and those that sum to b add b.

        Args:
            tensors: Out x in; names relative to the layer.
            width: Of the stream.
        """
        mlp = self.table.mlp
        result = dict(tensors)
        for name in mlp.readers if self.carries_shifts else ():
            bias = result.pop(mlp.bias(name), None)
            if bias is not None:
                result[mlp.weight(name)] = carry(tensors[mlp.weight(name)], bias)
        return self.table.turned(result)

    def raw(self, name: str) -> Tensor | None:
        """A tensor as the model has it, in float64 on the device; None if the model has none of this name."""
        if name not in self._origins:
            return None
        return self._origins[name].load(self.source.weights).to(device=self.device, dtype=torch.float64)

    def _weight(self, module: str) -> Tensor:
        tensor = self.raw(module + ".weight")
        assert tensor is not None, module  # shapes were checked against transformers' model
        return tensor

    def final_gain(self) -> Tensor:
        """The final norm's gain (D,)."""
        weight = self.raw(self.table.final_norm + ".weight")
        if weight is None:
            return torch.ones(self.width, dtype=torch.float64, device=self.device)
        return gain_of(self.table, weight)

    def embeddings(self, centre: bool = True) -> Tensors:
        """Weights of the token embedding and of positions, centred in a LayerNorm model.

        Args:
            centre: False leaves the token embedding as stored, for a tied head.
        """
        tensors = {module + ".weight": self._weight(module) for module in self.table.embeddings} | self.sinusoids
        token = self.table.embeddings[0] + ".weight"
        norm = self.table.embedding_norm
        if norm:
            tensors[token] = layer_norm(tensors[token], self._weight(norm), self.raw(norm + ".bias"), self.eps)
        if not self.layer_norm:
            return tensors
        return {name: rows if name == token and not centre else centre_rows(rows) for name, rows in tensors.items()}

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight (V, D) and bias (V,) with the final norm folded in."""
        weight = self._weight(self.table.embeddings[0] if self.tied else self.table.head)
        bias = self.raw(self.table.head + ".bias")
        shift = self.raw(self.table.final_norm + ".bias")
        return fold_into_reader(weight, bias, self.final_gain(), shift)

    def block(self, index: int) -> Tensors:
        """Weights of one decoder layer, folded, out x in; names relative to the layer."""
        prefix = f"{self.table.layers}.{index}."
        raw = {name.removeprefix(prefix): self.raw(name) for name in self.shapes if name.startswith(prefix)}
        scale = float(getattr(self.config, self.table.residual_scale)) if self.table.residual_scale else 1.0
        return fold_block(self.table, {name: tensor for name, tensor in raw.items() if tensor is not None}, scale)


def carry(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight (..., out, width) that gives W n + b for n + 1, where n sums to zero."""
    rows = centre_rows(weight)
    return rows if bias is None else rows + bias[..., None] / weight.shape[-1]


def gain_of(table: Table, weight: Tensor) -> Tensor:
    """The gain (D,) of a norm with this weight."""
    return 1 + weight if table.gain == "1+w" else weight


def fold_block(table: Table, raw: Tensors, residual_scale: float = 1.0) -> Tensors:
    """Fold the norms of one decoder layer.

    Args:
        table: Its architecture.
        raw: All its parameters as its modules hold them, names relative to the layer, float64.
        residual_scale: What the layer multiplies by what its sublayers add to the stream.

    Returns:
        Weights, out x in.

    Raises:
        UnsupportedModelError: the table doesn't account for a parameter.
    """
    folded: Tensors = {}
    raw = table.turned(raw)
    for sublayer in table.sublayers:
        weight, shift = (raw.get(f"{sublayer.norm}.{kind}") for kind in ("weight", "bias"))
        gain = None if weight is None else gain_of(table, weight)
        if sublayer.post_norm:
            after = gain_of(table, raw[f"{sublayer.post_norm}.weight"])
            raw[sublayer.weight(sublayer.writers[0])] = torch.diag(after)
        for name in sublayer.ends:
            weight, bias = raw.get(sublayer.weight(name)), raw.get(sublayer.bias(name))
            if weight is None:
                continue  # this layer is of another kind
            if name in sublayer.readers:
                weight, bias = fold_into_reader(weight, bias, gain, shift)
            else:
                weight, bias = weight * residual_scale, None if bias is None else bias * residual_scale
                if table.norm == "layer":
                    weight, bias = centre_writer(weight), None if bias is None else centre_rows(bias)
            folded |= {sublayer.weight(name): weight} | ({} if bias is None else {sublayer.bias(name): bias})
        folded |= {name: tensor for name, tensor in raw.items() if is_inside(name, sublayer.inner)}
    norms = {f"{norm}.{kind}" for s in table.sublayers for norm in (s.norm, s.post_norm) for kind in ("weight", "bias")}
    unknown = set(raw) - set(folded) - norms
    if unknown:
        raise UnsupportedModelError(
            f"a decoder layer has parameters that the table of {table.model_type!r} doesn't know: {sorted(unknown)}",
            allowed="layers of which every parameter is known to read or write the residual stream, or neither",
            next_step="report this model: the table has to be extended",
        )
    return folded


def is_inside(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter is one of these or in one of these modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)
