# Copyright 2026 the eigenslice authors. Licensed under the Apache License, Version 2.0.
"""A sliced model of any architecture, for results that no config of transformers can hold.

This is the source architecture's own model with narrower matrices. Attention, MLP, rotary embedding, masks and caches
are transformers' own modules. Two parts are ours: the norm without a gain, which is folded into the readers, and the
decoder layer's additions, where the skip connection may pass a shortcut matrix.

This file needs only torch and transformers. A copy of it travels in the folder of every such model, so that
`trust_remote_code=True` loads it where eigenslice is not installed.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_utils import PreTrainedModel

try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # transformers 5 before 5.23, which vLLM asks for
    SubConfigSpec = None

AUTO_MAP = {
    "AutoConfig": "modeling_eigenslice.SlicedConfig",
    "AutoModel": "modeling_eigenslice.SlicedModel",
    "AutoModelForCausalLM": "modeling_eigenslice.SlicedForCausalLM",
    "AutoModelForSequenceClassification": "modeling_eigenslice.SlicedForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_eigenslice.SlicedForTokenClassification",
}


class SlicedConfig(PreTrainedConfig):
    """Config of a sliced model.

    Args:
        text_config: The dense model's config, with the numbers of heads and blocks that are left. (Named as
            transformers names the config of a wrapped decoder, so that caches and `generate` find the number of layers,
            heads and so on.)
        architecture: Names of the readers and writers of the residual stream, from eigenslice's table.
        site_widths: Width of the residual stream at each site, in the order of the stream. There is a site before each
            sublayer (parallel blocks have one site a block), and the last site is before the head.
        neurons: Number of MLP neurons in each block, or in each of its experts; None is the dense model's number in all
            of them.
        key_value_heads: Number of key/value heads in every block, each with its query heads, if `text_config` has the
            dense model's number. Only folders of earlier versions have this; else `text_config` has the numbers.
        dense_width: The dense model's hidden size, if `text_config` has that of the heads that are left: some classes
            have no head_dim, and some want the hidden size to be a multiple of the number of heads.
        shortcuts: True if the skip connection of each site passes a matrix to the next site's basis.
        norm_eps: Epsilon of the norms. (The stream is stored scaled so that this is the dense model's.)
        reader_bias: True if every reader has a bias, which holds the norm's folded shift. Otherwise only readers with a
            bias in the dense model have one.
        head_bias: The same for the head.
        centered_embedding: True if one direction is removed from the token embeddings: a LayerNorm's mean subtraction
            in the model's basis. Only for tied embeddings behind LayerNorms.
    """

    model_type = "eigenslice"
    if SubConfigSpec is None:
        sub_configs = {"text_config": AutoConfig}  # pyright: ignore[reportAssignmentType]
    else:
        sub_configs_defaults = {"text_config": SubConfigSpec(AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    architecture: dict | None = None
    site_widths: list[int] | None = None
    neurons: list[int] | None = None
    key_value_heads: int | None = None
    dense_width: int | None = None
    shortcuts: bool = False
    rotated: bool = True
    norm_eps: float = 1e-5
    reader_bias: bool = False
    head_bias: bool = False
    centered_embedding: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if SubConfigSpec is None and not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**({"model_type": "llama"} | (self.text_config or {})))
        super().__post_init__(**kwargs)
        config: Any = self.text_config
        config.tie_word_embeddings = self.tie_word_embeddings

    def save_pretrained(self, *args: Any, **kwargs: Any):
        """Name all classes of this file, which is saved beside the config, whichever of them was loaded."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any):
        """This config: it is one decoder's, and answers all questions about it (vLLM would look for images else)."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Take other fields from the dense model's config: layers, heads, vocabulary, positions, windows."""
        config = self.__dict__.get("text_config")
        if name.startswith("_") or not isinstance(config, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        if name == "hidden_size" and self.site_widths:
            return self.site_widths[-1]
        if name in ("num_key_value_heads", "num_attention_heads") and self.key_value_heads is not None:
            return getattr(config, name) // config.num_key_value_heads * self.key_value_heads
        if name == "head_dim" and getattr(config, "head_dim", None) is None:
            return config.hidden_size // config.num_attention_heads
        return getattr(config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """The vocabulary is the dense config's, also when embeddings are resized."""
        if name == "vocab_size":
            setattr(self.text_config, name, value)
        else:
            super().__setattr__(name, value)


class SlicedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), over a sliced stream.

    The norm has a gain only if the embeddings are tied. It has a shift of 1 before experts, which have no biases: the
    shift carries the effect of the dense norm's shift. (Rows of the experts' weights sum to this effect; the stream's
    numbers sum to zero.)
    """

    def __init__(
        self, width: int, eps: float, gain: bool = False, like: torch.Tensor | None = None, shift: float = 0.0
    ):
        super().__init__()
        self.eps, self.shift = eps, shift
        self.weight = nn.Parameter(like.new_ones(width)) if gain and like is not None else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * self.weight
        if self.shift:
            x = x + self.shift
        return x.to(hidden_states.dtype)


class ProjectedRMSNorm(SlicedRMSNorm):
    """A norm between a sublayer and the stream: over the dense width, then into the stream's basis, with its gain."""

    def __init__(self, dense_width: int, width: int, eps: float, like: torch.Tensor):
        super().__init__(dense_width, eps)
        self.project = nn.Linear(dense_width, width, bias=False, device=like.device, dtype=like.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project(super().forward(hidden_states))


class SlicedLayerMixin(nn.Module):
    """The forward of a decoder layer, for any architecture: norm, sublayers, addition.

    The mixin joins transformers' own layer class, so that everything that looks for that class (gradient checkpointing,
    recording of hidden states, sharding) finds it.

    Attributes:
        sites: The sublayers at each site: names in the table, with a mark for attention.
        arguments: Names of the arguments that transformers' layer takes after the stream, in order.
        takes: The arguments that each of its modules takes by name; None for any.
        gives_tuple: True if transformers' model expects a tuple from its layers.
        shortcuts: A matrix for each site, or None.
        residual_dropout: Dropout on a sublayer's output, as in the dense layer (training only).
        stream_scale: Name of the factor of the stream behind the last site, or None.
    """

    sites: list[list[dict]]
    arguments: list[str]
    takes: dict[str, frozenset[str] | None]
    gives_tuple: bool
    shortcuts: nn.ModuleList | None
    residual_dropout: float
    stream_scale: str | None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(self.arguments, args, strict=False))
        for site in range(len(self.sites)):
            update = self.update(site, self.normalize(site, hidden_states), **kwargs)
            hidden_states = self.pass_on(site, self.skip(site, hidden_states) + update)
        return (hidden_states, None) if self.gives_tuple else hidden_states

    def normalize(self, site: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input of the sublayers of a site."""
        norm = self.sites[site][0]["norm"]
        return self.get_submodule(norm)(hidden_states) if norm else hidden_states

    def skip(self, site: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The stream at a site in the basis of the next one."""
        return self.shortcuts[site](hidden_states) if self.shortcuts is not None else hidden_states

    def scale_behind(self, site: int) -> torch.Tensor | None:
        """Return the factor of the stream behind a site, None without a factor."""
        last = site == len(self.sites) - 1
        return getattr(self, self.stream_scale) if self.stream_scale and last else None

    def pass_on(self, site: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The stream behind a site, as the next one gets it."""
        scale = self.scale_behind(site)
        return hidden_states if scale is None else hidden_states * scale

    def update(self, site: int, normalized: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the sublayers' output at a site. `kwargs` are the layer's: mask, cache, rotations."""
        outputs = [
            nn.functional.dropout(self.run(sublayer, normalized, **kwargs), self.residual_dropout, self.training)
            for sublayer in self.sites[site]
        ]
        return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]

    def run(self, sublayer: dict, normalized: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One sublayer: its modules, one after the other."""
        output: Any = normalized
        for name in sublayer["modules"]:
            if name not in self.takes:
                continue  # another kind of layer
            output = self.get_submodule(name)(output, **self.arguments_of(name, sublayer, output, kwargs))
            if isinstance(output, tuple):  # beside it: attention weights, a router's logits
                output = output[0]
        return output.reshape(*normalized.shape[:-1], -1)  # some experts return tokens without their sequences

    def arguments_of(self, name: str, sublayer: dict, x: torch.Tensor, kwargs: dict) -> dict:
        """Return the arguments that a module takes beside its input."""
        result = {}
        if sublayer["attention"]:
            names, takes = sublayer["renames"].get(name, {}), self.takes[name]
            renamed = {names.get(key, key): value for key, value in kwargs.items()}
            result = {k: value for k, value in renamed.items() if k is not None and (takes is None or k in takes)}
        if sublayer["adds_stream"]:
            result["residual"] = x.new_zeros(())
        return result


class CenteredMixin(nn.Module):
    """A token embedding that removes one direction, `center` (a unit vector), from its output.

    A LayerNorm model's embeddings are centred before slicing, x - mean(x). A tied head needs the rows as they were, so
    that the centring happens here, in the model's basis.
    """

    center: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = super().forward(*args, **kwargs)
        return x - (x @ self.center)[..., None] * self.center


@cache
def _derived(mixin: type, base: type) -> Any:
    """A class with `mixin`'s forward on top of another class."""
    name = mixin.__name__.removesuffix("Mixin").removesuffix("Layer") + base.__name__
    return type(name, (mixin, base), {"__module__": __name__, "__reduce_ex__": _reduce})


def _reduce(module: Any, protocol: Any) -> tuple:
    """Tell pickle how to make a derived class, which has no name in this file."""
    mixin, base = type(module).__bases__
    return _restore, (mixin, base), module.__dict__


def _restore(mixin: type, base: type) -> Any:
    """A module of a derived class, without its content."""
    derived = _derived(mixin, base)
    return derived.__new__(derived)


def _derive(module: Any, mixin: type) -> None:
    """Give one module `mixin`'s forward on top of its own class."""
    module.__class__ = _derived(mixin, type(module))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module by another one."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _resize_embedding(module: Any, width: int) -> None:
    module.weight = nn.Parameter(module.weight.new_zeros(module.weight.shape[0], width))
    module.embedding_dim = width


class StoredMixin(nn.Module):
    """Computed positions that are stored, since they are in the model's basis."""

    weights: nn.Parameter

    def make_weights(self, num_embeddings: int, *args: Any) -> None:
        raise IndexError(f"{num_embeddings} positions are more than this model has, {len(self.weights)}")


def _module(layer: nn.Module, name: str) -> nn.Module | None:
    """A module by its name, None if there is none."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _resize(layer: Any, sublayer: dict, name: str, inputs: int | None, outputs: int | None, bias: bool = False) -> None:
    """Change the widths of a reader or writer (None: unchanged), and give it a bias if it has none and is to.

    Nothing happens where the layer has no such module: layers of one model may differ.
    """
    stacked, transposed = name in sublayer["stacked"], name in sublayer["transposed"]
    path, _, leaf = name.rpartition(".") if stacked else (name, "", "weight")
    module: Any = _module(layer, path)
    if not hasattr(module, leaf):
        return
    weight = getattr(module, leaf)
    *experts, rows, columns = weight.shape
    if transposed:
        rows, columns = columns, rows
    rows, columns = outputs or rows, inputs or columns
    shape = (*experts, columns, rows) if transposed else (*experts, rows, columns)
    setattr(module, leaf, nn.Parameter(weight.new_zeros(shape)))
    bias_name = leaf + "_bias" if stacked else "bias"
    if bias or getattr(module, bias_name, None) is not None:
        setattr(module, bias_name, nn.Parameter(weight.new_zeros(*experts, rows)))
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = columns, rows
    elif hasattr(module, "nf"):  # transformers' Conv1D
        module.nx, module.nf = columns, rows


def _narrow_experts(block: nn.Module, built_width: int, width: int) -> None:
    """Tell experts and routers the stream's width, which they remember to reshape their input."""
    for module in block.modules():
        for name in ("hidden_size", "hidden_dim", "input_size"):
            if getattr(module, name, None) == built_width:
                setattr(module, name, width)


def _parameters(function: Any) -> tuple[list[str], bool]:
    """Names of a method's parameters, and whether it takes others by name, too."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD], any(p.kind is p.VAR_KEYWORD for p in parameters)


def _sites(architecture: dict) -> list[list[dict]]:
    attention = architecture["attention"] | {"attention": True}
    mlp = architecture["mlp"] | {"attention": False}
    return [[attention, mlp]] if architecture["parallel"] else [[attention], [mlp]]


def _of_heads(size: int, config: Any) -> int:
    """Rows of a reader, or columns of a writer, when some key/value heads are left."""
    return size // config.text_config.num_key_value_heads * config.key_value_heads


def _neurons_of(layer: Any, sublayer: dict, neurons: int | None) -> dict[str, int]:
    """Neurons of readers and writers where they are cut: the MLP's, and in a mixture its experts'.

    Shared experts have so many times as many as the others, as before.
    """
    if sublayer["attention"] or not neurons:
        return {}
    if not sublayer["stacked"]:
        names = (*sublayer["readers"], *sublayer["writers"], *sublayer.get("normed_writers", ()))
        return dict.fromkeys(names, neurons)
    counts = dict.fromkeys(sublayer["stacked"], neurons)
    shared = sublayer.get("shared", [])  # folders of earlier versions don't say
    path, _, leaf = sublayer["stacked"][-1].rpartition(".")
    experts: Any = _module(layer, path)
    first: Any = _module(layer, shared[0]) if shared else None
    if experts is not None and first is not None:
        dense = getattr(experts, leaf).shape[-2 if sublayer["stacked"][-1] in sublayer["transposed"] else -1]
        counts |= dict.fromkeys(shared, first.weight.shape[0] // dense * neurons)
    return counts


def _slice_layer(layer: Any, config: Any, widths: list[int], neurons: int | None) -> None:
    """Narrow one decoder layer. widths: at each of its sites, then at the next layer's first one."""
    weight = next(layer.parameters())
    sites, built_width = _sites(config.architecture), config.text_config.hidden_size
    dense_width = config.dense_width or built_width
    layer.arguments, layer.takes = _parameters(layer.forward)[0][1:], {}
    shortcuts = []
    for sublayers, width, next_width in zip(sites, widths[:-1], widths[1:], strict=True):
        for norm in {sublayer["norm"] for sublayer in sublayers} - {None}:
            delattr(layer, norm)
        if sublayers[0]["norm"]:
            shifted = config.reader_bias and any(sublayer["stacked"] for sublayer in sublayers)
            norm = SlicedRMSNorm(width, config.norm_eps, shift=1.0 if shifted else 0.0)
            setattr(layer, sublayers[0]["norm"], norm)
        for sublayer in sublayers:
            if sublayer["post_norm"]:
                if config.rotated:
                    norm = ProjectedRMSNorm(dense_width, next_width, config.norm_eps, weight)
                else:
                    norm = SlicedRMSNorm(dense_width, config.norm_eps, gain=True, like=weight)
                setattr(layer, sublayer["post_norm"], norm)
            of = _neurons_of(layer, sublayer, neurons)
            for name in sublayer["readers"]:
                inner = of.get(name)
                outputs = 2 * inner if inner and name in sublayer["gated"] else inner
                if sublayer["attention"] and config.key_value_heads is not None:
                    outputs = _of_heads(layer.get_submodule(name).weight.shape[0], config)
                _resize(layer, sublayer, name, width, outputs, config.reader_bias and not sublayer["stacked"])
            normed = sublayer.get("normed_writers", ())  # folders of earlier versions don't say
            for name in (*sublayer["writers"], *normed):
                inner = of.get(name)
                if sublayer["attention"] and config.key_value_heads is not None:
                    inner = _of_heads(layer.get_submodule(name).weight.shape[1], config)
                _resize(layer, sublayer, name, inner, dense_width if name in normed else next_width)
            if sublayer["stacked"]:
                _narrow_experts(layer.get_submodule(sublayer["modules"][0]), built_width, width)
            for name in sublayer["modules"]:
                module = _module(layer, name)
                if module is not None:
                    names, others = _parameters(module.forward)
                    layer.takes[name] = None if others else frozenset(names)
        shortcuts.append(nn.Linear(width, next_width, bias=False, device=weight.device, dtype=weight.dtype))
    _derive(layer, SlicedLayerMixin)
    layer.sites = sites
    layer.shortcuts = nn.ModuleList(shortcuts) if config.shortcuts else None
    layer.gives_tuple = config.architecture["layers_give_tuples"]
    layer.stream_scale = config.architecture.get("stream_scale")  # folders of earlier versions don't say
    dropout = config.architecture["dropout"]
    layer.residual_dropout = getattr(config.text_config, dropout) if dropout else 0.0


def _slice_model(model: nn.Module, config: Any) -> None:
    """Turn the dense architecture's freshly built model into the sliced one, in place."""
    architecture, widths = config.architecture, config.site_widths
    if architecture is None or widths is None:
        raise ValueError(
            "This config has no `architecture` or no `site_widths`: it is not the config of a model that "
            "eigenslice saved. Load the folder that `eigenslice slice` wrote."
        )
    layers: Any = model.get_submodule(architecture["layers"])
    sites = len(_sites(architecture))
    for index, layer in enumerate(layers):
        neurons = config.neurons[index] if config.neurons else None
        _slice_layer(layer, config, widths[index * sites : (index + 1) * sites + 1], neurons)
    for name in architecture["embeddings"]:
        _resize_embedding(model.get_submodule(name), widths[0])
    embedding: Any = model.get_submodule(architecture["embeddings"][0])
    head: Any = model.get_submodule(architecture["head"])
    scale = getattr(embedding, "embed_scale", None)
    if config.dense_width and isinstance(scale, float) and scale != 1:  # the root of the hidden size
        embedding.embed_scale = scale * (config.dense_width / config.text_config.hidden_size) ** 0.5
    if config.centered_embedding:
        _derive(embedding, CenteredMixin)
        embedding.center = nn.Parameter(embedding.weight.new_zeros(widths[0]))
    _resize(model, {"stacked": (), "transposed": ()}, architecture["head"], widths[-1], None, config.head_bias)
    if architecture["sinusoids"]:
        positions: Any = model.get_submodule(architecture["sinusoids"])
        _derive(positions, StoredMixin)
        # Not trained: transformers' module detaches them
        rows = embedding.weight.new_zeros(len(positions.weights), widths[0])
        positions.weights = nn.Parameter(rows, requires_grad=False)
    if architecture["embedding_norm"]:
        _replace(model, architecture["embedding_norm"], nn.Identity())  # the embedding's rows hold its output
    norm = SlicedRMSNorm(widths[-1], config.norm_eps, config.tie_word_embeddings, head.weight)
    _replace(model, architecture["final_norm"], norm)


class SlicedPreTrainedModel(PreTrainedModel):
    """The common base of sliced models."""

    config: SlicedConfig
    config_class = SlicedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class SlicedModel(SlicedPreTrainedModel):
    """The sliced model without its head, for `AutoModel`; vLLM's transformers backend builds this one."""

    def __init__(self, config: SlicedConfig):
        super().__init__(config)
        model = AutoModelForCausalLM.from_config(config.text_config)
        _slice_model(model, config)
        self.inner = model.base_model_prefix  # the name that it has in SlicedForCausalLM.model, and in checkpoints
        setattr(self, self.inner, model.base_model)
        self._no_split_modules = model._no_split_modules and [f"Sliced{n}" for n in model._no_split_modules]
        self.post_init()

    def get_decoder(self, *args: Any, **kwargs: Any):
        return getattr(self, self.inner)

    def get_input_embeddings(self):
        return self.get_decoder().get_input_embeddings()

    def set_input_embeddings(self, value):
        self.get_decoder().set_input_embeddings(value)

    def forward(self, *args: Any, **kwargs: Any):
        """Run the dense architecture's model."""
        return self.get_decoder()(*args, **kwargs)


class SlicedForSequenceClassification(GenericForSequenceClassification, SlicedPreTrainedModel):
    """The sliced model with transformers' own classification head on each sequence's last token."""

    def __init__(self, config: SlicedConfig):
        SlicedPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SlicedModel(config)
        self.score = nn.Linear(int(config.hidden_size), int(config.num_labels or 2), bias=False)
        self._no_split_modules = self.model._no_split_modules
        self.post_init()


class SlicedForTokenClassification(GenericForTokenClassification, SlicedPreTrainedModel):
    """The sliced model with transformers' own classification head on every token."""

    def __init__(self, config: SlicedConfig):
        SlicedPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SlicedModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.1)
        self.score = nn.Linear(int(config.hidden_size), int(config.num_labels or 2))
        self._no_split_modules = self.model._no_split_modules
        self.post_init()


class SlicedForCausalLM(SlicedPreTrainedModel, GenerationMixin):
    """The dense architecture's own causal language model with a sliced residual stream."""

    _can_compile_fullgraph = True

    def __init__(self, config: SlicedConfig):
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.text_config)
        _slice_model(self.model, config)
        self._no_split_modules = self.model._no_split_modules and [f"Sliced{n}" for n in self.model._no_split_modules]
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.model.set_output_embeddings(new_embeddings)

    def forward(  # noqa: PLR0913 - transformers' signature
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ):
        """Run the dense architecture's forward pass; arguments and result are transformers' usual ones."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
