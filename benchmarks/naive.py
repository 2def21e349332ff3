"""What anybody would try first to make a model smaller: leave out blocks, or channels with small weights.

Nothing here knows a family. Blocks are transformers' own list of decoder layers. A channel of the residual stream is
cut where the norms read and write the stream; everything else follows from the gradient (see `Channels`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Choice = Callable[[int, int], set[int]]
"""Which blocks to drop, from the number of blocks and how many of them go."""
INNER_NORMS = {"q_norm", "k_norm"}
"""Norms of queries and keys, which may be as wide as the stream."""


def stored(model: Any) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def in_block(name: str) -> bool:
    """Whether a parameter belongs to a block: transformers numbers blocks, and only parts of blocks besides."""
    return any(part.isdigit() for part in name.split("."))


def block_parameters(model: Any, sizes: dict[str, int] | None = None) -> int:
    """Parameters of the blocks: all but embeddings, head and last norm.

    Args:
        model: A model.
        sizes: Sizes of its parameters, where they aren't those of the model.
    """
    sizes = sizes or {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if in_block(name))


def blocks(model: Any) -> tuple[Any, str]:
    """The module that holds the list of decoder layers, and the list's name in it."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
                return module, name
    raise ValueError(f"{type(model).__name__} has no list of {model.config.num_hidden_layers} layers")


def without_blocks(model: Any, dropped: set[int]) -> Any:
    """A copy of a model without these blocks; run it without a cache."""
    smaller = copy.deepcopy(model)
    owner, name = blocks(smaller)
    layers = getattr(owner, name)
    kept = [index for index in range(len(layers)) if index not in dropped]
    setattr(owner, name, nn.ModuleList(layers[index] for index in kept))
    for key, value in list(vars(smaller.config).items()):
        if isinstance(value, list) and len(value) == len(layers):  # layer_types and the like
            setattr(smaller.config, key, [value[index] for index in kept])
    smaller.config.num_hidden_layers = len(kept)
    return smaller


def late(blocks: int, count: int) -> set[int]:
    """The blocks before the last one."""
    return set(range(blocks - 1 - count, blocks - 1))


def even(blocks: int, count: int) -> set[int]:
    """Blocks at equal distances from each other, the first and the last block spared where there are others."""
    inner = list(range(1, blocks - 1)) if count <= blocks - 2 else list(range(blocks))
    return {inner[int((part + 0.5) * len(inner) / count)] for part in range(count)}


def nearest_blocks(model: Any, most: int, choose: Choice) -> set[int]:
    """The blocks to drop so that the stored parameters come nearest to this number; at least one block goes."""
    owner, name = blocks(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in getattr(owner, name)]
    choices = [choose(len(sizes), count) for count in range(1, len(sizes))]
    return min(choices, key=lambda dropped: abs(stored(model) - sum(sizes[block] for block in dropped) - most))


class KeptChannels(nn.Module):
    """A norm of a narrower stream inside of the wide one: it sees the kept channels and gives 0 in the others."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept, self.width = copy.deepcopy(norm), kept, norm.weight.shape[0]
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                setattr(self.norm, name, nn.Parameter(getattr(norm, name).detach()[kept].clone()))
        if isinstance(norm, nn.LayerNorm):
            self.norm.normalized_shape = (len(kept),)

    def forward(self, stream: Tensor) -> Tensor:
        narrow = self.norm(stream[..., self.kept])
        return narrow.new_zeros(*narrow.shape[:-1], self.width).index_copy(-1, self.kept, narrow)


def with_channels(model: Any, kept: Tensor) -> Any:
    """A copy that computes what the model cut to these channels (K,) of its stream computes.

    Only the kept channels pass the embeddings and the norms. So no other channel is read, and nothing that is written
    to another channel is read either. Matrices stay as they are; `Channels.size` says how many parameters are needed.
    """
    smaller = copy.deepcopy(model)
    width = smaller.config.hidden_size
    for module in list(smaller.modules()):
        for name, child in module.named_children():
            if "Norm" in type(child).__name__ and name not in INNER_NORMS and _shape(child) == (width,):
                setattr(module, name, KeptChannels(child, kept))
    mask = torch.zeros(width).index_fill(0, kept, 1.0)

    def cut(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * mask

    for module in smaller.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            module.register_forward_hook(cut)
    return smaller


def _shape(norm: Any) -> tuple[int, ...]:
    """Shape of a norm's weight; () if it has none."""
    weight = getattr(norm, "weight", None)
    return () if weight is None else tuple(weight.shape)


@dataclass(frozen=True)
class Channels:
    """What the channels of a model's stream hold.

    Attributes:
        axes: Axis of each parameter that runs over the channels; a parameter without such an axis isn't here.
        magnitude: (D,) sum of the squares of the weights that belong to each channel.
        model: The model, of D channels.
    """

    axes: dict[str, int]
    magnitude: Tensor
    model: Any

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> "Channels":
        """Find the axes: with some channels cut, their entries, and only theirs, get no gradient along such an axis.

        Args:
            model: A model whose stream has D channels.
            ids: Tokens (B, T) to run; each expert has to see one of them.
        """
        width = model.config.hidden_size
        kept = torch.arange(0, width, 2)
        cut = with_channels(model, kept)
        cut(ids, labels=ids, use_cache=False).loss.backward()
        gradients = {name: parameter.grad for name, parameter in cut.named_parameters()}
        axes, magnitude = {}, torch.zeros(width, dtype=torch.float64)
        for name, parameter in model.named_parameters():
            for axis in (axis for axis, size in enumerate(parameter.shape) if size == width):
                # A norm that was narrowed has another name
                if name not in gradients or not _alive(gradients[name], axis)[1::2].any():
                    axes[name] = axis
                    squares = parameter.detach().double().square()
                    magnitude += squares.movedim(axis, 0).flatten(1).sum(1) if squares.dim() > 1 else squares
                    break
        return cls(axes, magnitude, model)

    def sizes(self, width: int) -> dict[str, int]:
        """Parameters of each tensor of the model with so many channels."""
        dense = self.model.config.hidden_size
        return {
            name: parameter.numel() // dense * width if name in self.axes else parameter.numel()
            for name, parameter in self.model.named_parameters()
        }

    def largest(self, width: int) -> Tensor:
        """The channels of largest magnitude, in order."""
        return self.magnitude.topk(width).indices.sort().values

    def width_for(self, most: int) -> int:
        """The largest width at which at most so many parameters are stored, at least 1."""
        widths = range(self.model.config.hidden_size, 0, -1)
        return next((width for width in widths if sum(self.sizes(width).values()) <= most), 1)


def _alive(gradient: Tensor, axis: int) -> Tensor:
    """Which entries along an axis have a gradient.

    Raises:
        ValueError: none has, so that nothing is known of the parameter.
    """
    alive = gradient.movedim(axis, 0).flatten(1).any(1) if gradient.dim() > 1 else gradient != 0
    if not alive.any():
        raise ValueError(f"a parameter {tuple(gradient.shape)} has no gradient")
    return alive
