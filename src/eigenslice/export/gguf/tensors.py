"""The tensors of a GGUF, from a checkpoint's tensors: names, formats, and llama.cpp's order.

llama.cpp differs from transformers in four points. Fused layers (phi3's q, k, v) are stored one by one. Experts are
stored in one tensor. Rows of queries and keys have another order. The gain of a norm is stored instead of the gain
minus one.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGMLQuantizationType, get_tensor_name_map
from torch import Tensor

from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.errors import UnsupportedModelError
from eigenslice.export.gguf.arch import ALLOWED
from eigenslice.export.gguf.config import dense_config, head_dim, is_custom
from eigenslice.export.gguf.rope import frequencies, interleave, rope_factors, rotary_dim, scale_rotary
from eigenslice.export.gguf.table import Architecture
from eigenslice.export.gguf.types import GgufType, format_of

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Source:
    """A tensor as llama.cpp has it, but under transformers' name and in transformers' order.

    Attributes:
        name: Its name.
        shape: Its shape.
        load: Function that gives the tensor.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def module(self) -> str:
        """The last part of the module's name."""
        return self.name.split(".")[-2]

    @property
    def is_bias(self) -> bool:
        """True for the bias of a linear layer."""
        return self.name.endswith(".bias") and not self.module.endswith("norm")


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name in the GGUF, its shape, its format, and the function that gives it."""

    name: str
    shape: tuple[int, ...]
    format: GGMLQuantizationType
    load: Callable[[], Tensor]


def entries(config: Any, weights: SafetensorsWeights, arch: Architecture, kind: GgufType) -> Iterator[Entry]:
    """All tensors of a GGUF.

    Raises:
        UnsupportedModelError: the architecture has no place for one.
    """
    for name, factors in rope_factors(config, arch.interleaved).items():
        yield Entry(name, tuple(factors.shape), GGMLQuantizationType.F32, lambda factors=factors: factors)
    names = get_tensor_name_map(arch.arch, dense_config(config).num_hidden_layers)
    for source in (*_sources(config, weights, arch), *_gainless(config, weights)):
        name = names.get_name(source.name, try_suffixes=(".weight", ".bias"))
        if name is None or (source.is_bias and source.module not in arch.biases):
            raise UnsupportedModelError(
                f"llama.cpp's {arch.name!r} has no place for the tensor {source.name}",
                allowed=ALLOWED,
                next_step="check what the folder holds; what llama.cpp can't run, transformers and vLLM do",
            )
        yield Entry(
            name,
            source.shape,
            format_of(kind, source.shape, source.name),
            lambda source=source: _converted(source, config, arch),
        )


def _plain_name(config: Any, stored: str) -> str:
    """A tensor's name in a stock model: eigenslice's class has the dense architecture's model in itself."""
    return stored.removeprefix("model.") if is_custom(config) else stored


def _sources(config: Any, weights: SafetensorsWeights, arch: Architecture) -> Iterator[Source]:
    """Yield a checkpoint's tensors, with fused layers taken apart and experts stacked."""
    experts: dict[str, dict[int, str]] = {}
    for stored in weights.names():
        name = _plain_name(config, stored)
        if name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        whole = Source(name, weights.shape(stored), lambda stored=stored: weights.load(stored))
        expert = EXPERT.fullmatch(name)
        if expert:
            experts.setdefault(f"{expert[1]}.{expert[3]}.weight", {})[int(expert[2])] = stored
        elif whole.module in arch.fused:
            yield from _parts(whole, config, arch.fused[whole.module])
        else:
            yield whole
    for name, stack in experts.items():
        ordered = [stored for _, stored in sorted(stack.items())]
        yield Source(
            name,
            (len(ordered), *weights.shape(ordered[0])),
            lambda ordered=ordered: torch.stack([weights.load(stored) for stored in ordered]),
        )


def _parts(whole: Source, config: Any, modules: tuple[str, ...]) -> Iterator[Source]:
    """The linear layers in one that holds the rows of all of them."""
    heads, kv_heads = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    rows = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    start = 0
    for module in modules:
        end = start + rows.get(module, whole.shape[0] // len(modules))
        yield Source(
            whole.name.replace(f".{whole.module}.", f".{module}."),
            (end - start, *whole.shape[1:]),
            lambda start=start, end=end: whole.load()[start:end],
        )
        start = end


def _gainless(config: Any, weights: SafetensorsWeights) -> Iterator[Source]:
    """Norms of eigenslice's class that have no gain, by the names that stock models have for them."""
    if not is_custom(config):
        return
    names = {_plain_name(config, stored) for stored in weights.names()}
    layers = range(dense_config(config).num_hidden_layers)
    blocks = [
        f"model.layers.{i}.{norm}.weight" for i in layers for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    width = config.hidden_size
    for name in (*blocks, "model.norm.weight"):
        if name not in names:
            yield Source(name, (width,), lambda: torch.ones(width))


def _converted(source: Source, config: Any, arch: Architecture) -> Tensor:
    """A tensor with the numbers that llama.cpp wants, in float32."""
    tensor = source.load().float()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(source.module)
    if heads and arch.interleaved:
        rotary, (_, factor) = rotary_dim(config), frequencies(config)
        tensor = interleave(tensor if factor == 1 else scale_rotary(tensor, heads, rotary, factor), heads, rotary)
    if len(source.shape) == 1 and source.name.endswith(".weight"):
        tensor = tensor + arch.gain_offset
    return tensor
