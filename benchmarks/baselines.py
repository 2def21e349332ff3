"""What users would otherwise do to make a model smaller without training: drop blocks, or prune its widths.

Both are rebuilt here, minimally, on transformers' own model, for Llama-like ones (Llama, Mistral, Qwen2, Qwen3).

- drop blocks: ShortGPT (arXiv 2403.03853). A block's influence is 1 - cosine similarity of its input and output,
  averaged over tokens; the least influential ones go.
- width pruning: importance from activations as in Minitron (arXiv 2407.14679), without its retraining. A hidden
  channel counts by the mean square of what the norms give there, summed over the norms; an MLP neuron by the root
  mean square of its activation times the norm of its column in the output matrix.
"""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenslice.data.batches import Batch
from eigenslice.errors import OptionsError, UnsupportedModelError

HIDDEN, MLP = "hidden", "mlp"
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, HIDDEN),
    "lm_head.weight": (None, HIDDEN),
    "q_proj.weight": (None, HIDDEN),
    "k_proj.weight": (None, HIDDEN),
    "v_proj.weight": (None, HIDDEN),
    "q_proj.bias": (None,),
    "k_proj.bias": (None,),
    "v_proj.bias": (None,),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "o_proj.weight": (HIDDEN, None),
    "o_proj.bias": (HIDDEN,),
    "gate_proj.weight": (MLP, HIDDEN),
    "gate_proj.bias": (MLP,),
    "up_proj.weight": (MLP, HIDDEN),
    "up_proj.bias": (MLP,),
    "down_proj.weight": (HIDDEN, MLP),
    "down_proj.bias": (HIDDEN,),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "norm.weight": (HIDDEN,),
}
"""Which axes of a parameter are cut, by the end of its name."""


@dataclass(frozen=True)
class Importance:
    """What the calibration tokens say about a dense model of width D with MLPs of I neurons.

    Attributes:
        blocks: Influence of each block, 0 for one that changes nothing.
        channels: (D,) mean square of the norms' outputs, summed over the norms.
        neurons: (I,) for each block: RMS of the activation times the norm of the output column.
    """

    blocks: list[float]
    channels: Tensor
    neurons: list[Tensor]


Baseline = Callable[[Any, Importance, int], tuple[Any, str]]
"""From a dense model, its importance and the most parameters allowed to a smaller model and what was done to it."""


def stored(model: Any) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(model: Any, batches: list[Batch]) -> Importance:
    """Run the dense model over calibration tokens; padding doesn't count."""
    check_llama_like(model)
    inner, layers = model.model, list(model.model.layers)
    width, count, mask = inner.norm.weight.shape[0], 0, torch.empty(0, dtype=torch.bool)
    similarity = [0.0] * len(layers)
    channels = torch.zeros(width, dtype=torch.float64, device=model.device)
    inputs = [layer.mlp.down_proj.in_features for layer in layers]
    neurons = [torch.zeros(count, dtype=torch.float64, device=model.device) for count in inputs]

    def add_squares(sums: Tensor, values: Tensor) -> None:
        sums += values[mask].double().square().sum(0)

    def add_similarity(index: int, before: Tensor, after: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before[mask].double(), after[mask].double(), dim=-1)
        similarity[index] += float(cosine.sum())

    def watch(index: int, layer: Any) -> list[Any]:
        def block(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            add_similarity(index, before, output[0] if isinstance(output, tuple) else output)

        return [
            layer.register_forward_hook(block, with_kwargs=True),
            layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: add_squares(neurons[index], args[0])),
        ]

    norms = [inner.norm, *(n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm))]
    with torch.no_grad(), ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for hook in watch(index, layer):
                hooks.callback(hook.remove)
        for norm in norms:
            hook = norm.register_forward_hook(lambda module, args, output: add_squares(channels, output))
            hooks.callback(hook.remove)
        for batch in batches:
            ids = batch.input_ids.to(model.device)
            given = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
            mask = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
            count += int(mask.sum())
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
            inner(input_ids=ids, attention_mask=given, position_ids=positions, use_cache=False)
    columns = [layer.mlp.down_proj.weight.double().norm(dim=0) for layer in layers]
    return Importance(
        [1 - total / count for total in similarity],
        channels / count,
        [(sums / count).sqrt() * column for sums, column in zip(neurons, columns, strict=True)],
    )


def without_blocks(numbers: Iterable[int]) -> str:
    """What a plan that leaves out blocks says of them."""
    return "without blocks " + ", ".join(map(str, sorted(numbers)))


def drop_blocks(model: Any, importance: Importance, most: int) -> tuple[Any, str]:
    """Leave out the blocks of least influence until at most so many parameters are left."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    order = sorted(range(len(sizes)), key=lambda index: importance.blocks[index])
    dropped: list[int] = []
    left = stored(model)
    while left > most:
        if len(dropped) == len(order) - 1:
            raise unreachable(most, left, "one block is left")
        dropped.append(order[len(dropped)])
        left -= sizes[dropped[-1]]
    smaller = shared_copy(model)
    kept = [index for index in range(len(sizes)) if index not in dropped]
    layers = [smaller.model.layers[index] for index in kept]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    smaller.model.layers = nn.ModuleList(layers)
    types = getattr(smaller.config, "layer_types", None)
    smaller.config.num_hidden_layers = len(kept)
    if types:
        smaller.config.layer_types = [types[index] for index in kept]
    return smaller, without_blocks(dropped)


def prune_width(model: Any, importance: Importance, most: int) -> tuple[Any, str]:
    """Keep the most important channels and neurons, the same share of both, in at most so many parameters."""
    parameters = dict(model.named_parameters())
    width, neurons = len(importance.channels), len(importance.neurons[0])

    def size(hidden: int) -> int:
        cut = {HIDDEN: hidden, MLP: _share(neurons, hidden, width)}
        shapes = ([cut[a] if a else n for a, n in zip(_axes(k), p.shape, strict=True)] for k, p in parameters.items())
        return sum(math.prod(shape) for shape in shapes)

    hidden = next((hidden for hidden in range(width, 0, -1) if size(hidden) <= most), None)
    if hidden is None:
        raise unreachable(most, size(1), "one channel is left")
    channels = importance.channels.topk(hidden).indices.sort().values
    kept = [scores.topk(_share(neurons, hidden, width)).indices.sort().values for scores in importance.neurons]
    smaller = shared_copy(model)
    for name, parameter in parameters.items():
        cut = parameter.detach()
        for axis, kind in enumerate(_axes(name)):
            if kind == HIDDEN:
                cut = cut.index_select(axis, channels)
            elif kind == MLP:
                cut = cut.index_select(axis, kept[int(name.split(".layers.")[1].split(".")[0])])
        parent, _, leaf = name.rpartition(".")
        setattr(smaller.get_submodule(parent), leaf, nn.Parameter(cut.clone(), requires_grad=False))
    if model.lm_head.weight is model.model.embed_tokens.weight:
        smaller.lm_head.weight = smaller.model.embed_tokens.weight
    return smaller, f"hidden {hidden}, MLP {_share(neurons, hidden, width)}"


def _share(neurons: int, hidden: int, width: int) -> int:
    """As many neurons for so many channels."""
    return max(1, round(neurons * hidden / width))


def _axes(name: str) -> tuple[str | None, ...]:
    return AXES[".".join(name.split(".")[-2:])]


def check_llama_like(model: Any) -> None:
    """Raises UnsupportedModelError where a parameter isn't one of a Llama-like model."""
    unknown = [name for name, _ in model.named_parameters() if ".".join(name.split(".")[-2:]) not in AXES]
    if unknown or not hasattr(model.model, "layers"):
        raise UnsupportedModelError(
            f"the baselines don't know {', '.join(unknown[:3])} of a {model.config.model_type}",
            allowed="Llama-like models: llama, mistral, qwen2, qwen3",
            next_step="leave the baselines out of --methods",
        )


def shared_copy(model: Any) -> Any:
    """A copy whose parameters are the model's own, so that it takes no memory."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def unreachable(most: int, left: int, where: str) -> OptionsError:
    """The error of a size that a method can't reach."""
    return OptionsError(
        f"{left} parameters when {where}, and {most} are allowed",
        allowed="a size that the embeddings leave room for",
        next_step="choose a larger size",
    )
