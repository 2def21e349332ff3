"""A causal language model as one function of tensors, keys and values of earlier tokens among them.

Graph formats hold such a function: (token ids, mask, positions, past) to (logits, present). Inputs and outputs have the
names of the Optimum exporters, so that generation loops for Optimum take the result. Optimum's own exporters can't be
used: they ask for transformers below 4.58 (optimum-onnx 0.1.0) and below 5.6 (optimum-intel 2.2.0).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from eigenslice.errors import UnsupportedModelError

INPUTS = ("input_ids", "attention_mask", "position_ids")
LOGITS = "logits"


class _PastLayer(DynamicLayer):
    """Keys and values of one layer, given from outside; their number is never asked, so that graphs keep it open."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]


class CachedModel(nn.Module):
    """The function. Layers keep all their past: windows are in the mask.

    Args:
        model: A causal language model of transformers, or eigenslice's class.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or ()
        self.window: int | None = getattr(config, "sliding_window", None)
        self.kinds = tuple(dict.fromkeys(kinds)) or ("full_attention" if self.window is None else "sliding_attention",)

    def masks(self, attention_mask: Tensor, tokens: int) -> Tensor | dict[str, Tensor]:
        """Return a mask for each kind of layer, (batch, 1, tokens, past + tokens), which is added to the scores."""
        total = attention_mask.shape[1]
        query = torch.arange(tokens)[:, None] + (total - tokens)
        key = torch.arange(total)[None, :]
        padding = (attention_mask != 0)[:, None, None, :]
        seen = {"full_attention": key <= query}
        if self.window is not None:
            seen["sliding_attention"] = (key <= query) & (key > query - self.window)
        masks = {
            kind: torch.where(seen[kind][None, None] & padding, 0.0, torch.finfo(torch.float32).min)
            for kind in self.kinds
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of each layer.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, past + tokens); 0 is padding.
            position_ids: (batch, tokens).
            past: Keys and values of each layer, each (batch, heads, past, head_dim).
        """
        cache = Cache(layers=[_PastLayer(past[2 * i], past[2 * i + 1]) for i in range(self.layers)])
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.masks(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (output.logits, *(tensor for layer in cache.layers for tensor in _kept(layer) if tensor is not None))


def _kept(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of a layer's cache."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)


@dataclass(frozen=True)
class Graph:
    """The input of an exporter.

    Attributes:
        module: The function.
        arguments: An example of its arguments.
        dynamic: Dimensions of the arguments that may change.
        past: Names of the past keys and values.
        present: Names of the present keys and values.
    """

    module: CachedModel
    arguments: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    past: list[str]
    present: list[str]


def graph_of(model: Any) -> Graph:
    """The function of a model in float32 on the CPU, with an example: 2 sequences, 3 tokens after 5.

    Raises:
        UnsupportedModelError: the model has layers other than attention with a full or windowed view of its past.
    """
    module = CachedModel(model).eval()
    strange = [kind for kind in module.kinds if kind not in ("full_attention", "sliding_attention")]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    kept = [tensor for layer in cache.layers for tensor in _kept(layer) if tensor is not None]
    if strange or len(kept) != 2 * module.layers:
        raise UnsupportedModelError(
            f"this {model.config.model_type!r} model has other layers than attention: "
            + ", ".join(strange or sorted({type(layer).__name__ for layer in cache.layers})),
            allowed="models whose layers keep keys and values of all tokens, or of a window",
            next_step="run it with transformers or vLLM (docs/serving.md)",
        )
    batch, tokens, before = 2, 3, 5
    past = [torch.zeros(batch, tensor.shape[1], before, tensor.shape[3]) for tensor in kept]
    rows, new, old = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    total = torch.export.Dim.AUTO  # past + tokens
    pairs = [f"{i}.{kind}" for i in range(module.layers) for kind in ("key", "value")]
    positions = torch.arange(before, before + tokens)[None].repeat(batch, 1)
    ids, mask = torch.ones(batch, tokens, dtype=torch.long), torch.ones(batch, before + tokens, dtype=torch.long)
    return Graph(
        module,
        (ids, mask, positions, past),
        ({0: rows, 1: new}, {0: rows, 1: total}, {0: rows, 1: new}, [{0: rows, 2: old}] * len(past)),
        [f"past_key_values.{pair}" for pair in pairs],
        [f"present.{pair}" for pair in pairs],
    )
