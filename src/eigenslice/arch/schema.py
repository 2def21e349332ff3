"""The fields of a table: the readers and writers of the residual stream, and its norms.

Names are module paths as transformers builds the model. Names of a `Sublayer` are relative to a decoder layer, all
other names to the model. A name that a layer doesn't have is skipped there. Layers of one model may differ (dense
layers and mixtures of experts), and so may variants of a family. A parameter that no name covers is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from eigenslice.arch.heads import HeadCounts, HeadRows


def always(config: Any) -> bool:
    """The condition of a stock form without one."""
    return True


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """Attention or MLP: the modules between a norm and the addition to the residual stream."""

    norm: str | None
    """The norm whose output the sublayer reads; None if it reads the stream as it is."""
    modules: tuple[str, ...]
    """Modules called one after the other, as far as a layer has them; the first one's input is the norm's output."""
    readers: tuple[str, ...]
    """Linear layers whose input is the norm's output."""
    writers: tuple[str, ...]
    """Linear layers whose output is added to the residual stream."""
    inner: tuple[str, ...] = ()
    """Modules or parameters that touch the stream at neither end; kept as they are."""
    post_norm: str | None = None
    """An RMSNorm between the last linear layer and the stream. It doesn't commute with a rotation: gain * RMSN(W a), in
    a basis Q, is Q^T diag(gain) RMSN(W a). So W keeps its outputs. Where the stream is rotated, the custom class has a
    matrix behind the norm, `POST_NORM.project`; where it isn't, the norm keeps its gain."""
    normed_writers: tuple[str, ...] = ()
    """Linear layers whose output passes the `post_norm` before it is added to the stream."""
    can_cut_neurons: bool = False
    """True if neurons can be cut: neuron i is row i of every reader and column i of the writer, and nothing in between
    joins two neurons. In a mixture, the neurons of each expert (`stacked`) are cut, and of `shared` experts."""
    heads: Mapping[str, HeadRows] = field(default_factory=dict)
    """For readers, writers and inner modules whose rows (a writer's columns) belong to heads: the order of the rows.
    Heads can be cut if this says anything; nothing may join two heads then."""
    why_no_heads: str = ""
    """Reason why heads can't be cut, for the user."""
    gated: tuple[str, ...] = ()
    """Readers that are gate and up projection in one: rows of the gate first, then rows of the up projection."""
    interleaved: bool = False
    """True if the rows of gate and up projection take turns instead."""
    transposed: tuple[str, ...] = ()
    """Readers and writers that hold their weights as in x out (transformers' Conv1D; some experts)."""
    stacked: tuple[str, ...] = ()
    """Readers and writers that are no modules, but one parameter for all experts, (experts, out, in); a bias, if there
    is one, is called NAME_bias."""
    routers: tuple[str, ...] = ()
    """Readers, and modules or parameters of `inner`, whose parameters have a row or a number for each expert."""
    shared: tuple[str, ...] = ()
    """Readers and writer of shared experts, which all tokens pass, if configs give their neurons as a multiple of an
    expert's neurons. Shared experts then lose the same share of neurons."""
    renames: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    """For a module of the attention: arguments of the layer that it takes under another name, or (None) doesn't get."""
    adds_stream: bool = False
    """True if the modules take the stream as an argument `residual` and add it themselves."""

    @property
    def can_cut_heads(self) -> bool:
        """True if key/value heads can be cut, each with its query heads, or query heads alone."""
        return bool(self.heads)

    def inner_heads(self, name: str) -> tuple[str, HeadRows] | None:
        """Return the inner module or parameter that a parameter is in, and its order of rows, if it has heads."""
        found = (part for part in self.heads if part in self.inner and (name == part or name.startswith(part + ".")))
        part = next(found, None)
        return None if part is None else (part, self.heads[part])

    @property
    def ends(self) -> tuple[str, ...]:
        """Readers and writers."""
        return (*self.readers, *self.writers)

    @property
    def experts(self) -> str:
        """Name of the module that holds the stacked parameters."""
        return self.stacked[0].rpartition(".")[0]

    @property
    def shared_writer(self) -> str | None:
        """Name of the shared experts' writer, if there is one."""
        return next((name for name in self.writers if name in self.shared), None)

    @property
    def observed(self) -> tuple[str, ...]:
        """Modules whose inputs show the input of the writer of neurons or heads: experts, in a mixture."""
        shared = (self.shared_writer,) if self.shared_writer else ()
        if self.stacked:
            return (self.experts, *shared)
        return (self.neuron_writer, self.post_norm) if self.post_norm else (self.neuron_writer,)

    @property
    def neuron_writer(self) -> str:
        """The writer whose columns are the neurons."""
        return self.stacked[-1] if self.stacked else (self.normed_writers or self.writers)[0]

    @property
    def post_gain(self) -> str:
        """Name of the post norm's weight."""
        return f"{self.post_norm}.weight"

    @property
    def projection(self) -> str:
        """Name of the matrix behind the post norm, where the stream is rotated."""
        return f"{self.post_norm}.project.weight"

    def has_neurons(self, name: str) -> bool:
        """Return whether the neurons that can be cut are rows of this reader, or columns of this writer."""
        return self.can_cut_neurons and (not self.stacked or name in (*self.stacked, *self.shared))

    def is_per_expert(self, part: str) -> bool:
        """Return whether the first axis of a parameter of the layer counts experts."""
        stacked = (*self.stacked, *(self.bias(name) for name in self.stacked))
        return part in stacked or any(part == name or part.startswith(f"{name}.") for name in self.routers)

    def weight(self, name: str) -> str:
        """Name of the weight of a reader or writer."""
        return name if name in self.stacked else name + ".weight"

    def bias(self, name: str) -> str:
        """Name of the bias of a reader or writer, whether it has one or not."""
        return name + ("_bias" if name in self.stacked else ".bias")

    def transpose_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight from the module's orientation to out x in, or back."""
        return (*shape[:-2], shape[-1], shape[-2]) if name in self.transposed else shape


NOT_LLAMA_CPP = "llama.cpp refuses this type at widths other than heads x head_dim"


@dataclass(frozen=True, kw_only=True)
class StockForm:
    """A config class of transformers that can hold a sliced model of this architecture."""

    model_type: str
    applies: Callable[[Any], bool] = always
    """Condition on the dense config: this type can express its mathematics."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Config values that this type needs to be the same mathematics."""
    zero_biases: tuple[str, ...] = ()
    """Linear layers (relative to a decoder layer) that this type gives a bias which the source doesn't have."""
    portable: bool = False
    """True if llama.cpp and vLLM are known to run this type at widths other than heads x head_dim."""
    rotated: bool = True
    """False if the type holds the stream in the dense model's own coordinates only, at full width."""
    warning: str = ""
    """A known fault of other runtimes at such widths, for the user."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A variant that breaks the mathematics."""

    when: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Configs of a family for which other values of the table hold."""

    when: Callable[[Any], bool]
    changes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """An architecture, as data."""

    model_type: str
    norm: Literal["rms", "layer"]
    eps: str | float
    """The norms' epsilon: a field of the config, or the number that transformers hard-codes."""
    gain: Literal["w", "1+w"] = "w"
    """The gain of the norms, as a function of their weight w."""
    embeddings: tuple[str, ...]
    """Token embedding first, then learned positions if there are any; all write the stream."""
    sinusoids: str | None = None
    """Module with a table of positions that writes the stream, too, and that checkpoints don't hold."""
    embedding_norm: str | None = None
    """A norm between the token embedding and the stream. It is computed for the whole vocabulary, once, so that the
    embedding isn't the head's matrix any more."""
    width_scales_embedding: bool = False
    """True if transformers multiplies the token embedding by sqrt(hidden_size)."""
    layers: str
    layers_give_tuples: bool = False
    """True if transformers' model expects its layers to return a tuple."""
    reshapes_output: bool = False
    """True if transformers' model reshapes the last block's output to the embeddings' width."""
    final_norm: str
    lm_head: str
    logit_scale: Callable[[Any], float] | None = None
    """Function that gives the factor of the head's output, from the config."""
    attention: Sublayer
    mlp: Sublayer
    neurons_field: str | None = "intermediate_size"
    """Field of the config with the number of MLP neurons, for stock forms; None if it is four times the hidden size."""
    experts_field: str | None = None
    """Field of the config with the number of experts, if experts can be cut."""
    groups_field: str | None = None
    """Field of the config with the number of groups of experts: equally many experts of each group stay. A router may
    rate a group by its best two experts, so that at least two stay."""
    kv_heads: Callable[[Any], int] | None = None
    """Function that gives the number of key/value heads from the config, if `kv_heads_field` isn't that number."""
    kv_heads_field: str | None = "num_key_value_heads"
    """Field of the config with the number of key/value heads; None if it is the number of query heads."""
    heads_span_width: bool = False
    """True if the config has no head_dim: heads x head_dim is the hidden size."""
    width_fields: tuple[str, ...] = ()
    """Further fields of the config that are the hidden size."""
    heads_step: int = 1
    """Divisor of the number of heads, in the code of the family."""
    parallel: bool | str = False
    """True if attention and MLP read the same stream; or the name of the config's boolean field for it."""
    residual_scale: str | None = None
    """Field of the config with the factor of a sublayer's output. The factor is folded into the writers."""
    stream_scale: str | None = None
    """Parameter of a decoder layer, listed in `inner`, that the stream is multiplied by behind the layer."""
    dropout: str | None = None
    """Field of the config with the dropout on the sublayers' outputs (training only)."""
    numbered: str | None = None
    """Field of the config that, where it is set, makes blocks depend on their numbers: none can be left out then."""
    stock: tuple[StockForm, ...] = ()
    """Stock forms, the preferred one first."""
    variants: tuple[Variant, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention and MLP."""
        return self.attention, self.mlp

    @property
    def has_post_norms(self) -> bool:
        """True if sublayers' outputs are normed before they are added to the stream."""
        return any(sublayer.post_norm for sublayer in self.sublayers)

    @property
    def forms(self) -> tuple[StockForm, ...]:
        """Stock forms, the preferred one first; the last one is the architecture's own, at full width."""
        return (*self.stock, StockForm(model_type=self.model_type, rotated=False))

    @property
    def one_width(self) -> bool:
        """True if the stream must be as wide behind the last block as before the first block."""
        return self.reshapes_output or bool(self.mlp.stacked)  # transformers' experts return the width they are given

    def is_parallel(self, config: Any) -> bool:
        """Return whether a block of this model has one site (parallel) instead of two."""
        return getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel

    def head_counts(self, config: Any) -> HeadCounts | None:
        """Return the numbers of heads of this model; None if heads can't be cut."""
        if not self.attention.can_cut_heads:
            return None
        queries = int(config.num_attention_heads)
        if self.kv_heads is not None:
            kv = self.kv_heads(config)
        else:
            kv = int((self.kv_heads_field and getattr(config, self.kv_heads_field, None)) or queries)
        return HeadCounts(kv, queries // kv)

    def epsilon(self, config: Any) -> float:
        """The epsilon of this model's norms."""
        return float(getattr(config, self.eps) if isinstance(self.eps, str) else self.eps)

    def sites(self, config: Any) -> tuple[tuple[Sublayer, ...], ...]:
        """The sublayers at each site of a block, in the order in which the stream passes the sites."""
        return (self.sublayers,) if self.is_parallel(config) else ((self.attention,), (self.mlp,))

    def transpose(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's weights (names relative to the layer) from its modules' orientation to out x in, or back."""
        names = {s.weight(name) for s in self.sublayers for name in s.transposed}
        return {name: t.transpose(-1, -2) if name in names else t for name, t in tensors.items()}
