"""Kinds of blocks: two blocks of one kind compute the same if they have the same weights.

Sliding and full attention, dense layers and mixtures, recurrent layers and attention are kinds. transformers decides a
block's kind when it builds the model. So the kind is read from the built block, not from a list of config fields: its
modules' classes, the shapes of its parameters, and plain attributes such as `sliding_window`. What a model passes to a
block, such as its mask, is decided by the lists in the config that have an entry for each block.
"""

from collections.abc import Hashable
from typing import Any

from torch import nn

ENTRY_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Fields of configs with an entry for each block."""
NUMBERS = ("layer_idx", "layer_id")
"""Attributes with the number of a block, by which it finds its part of the cache."""
PLAIN = (bool, int, float, str, type(None))

Kind = tuple[Hashable, ...]


def block_kinds(config: Any, model: Any, layers: str) -> tuple[Kind, ...]:
    """Return the kind of each block of a model.

    Args:
        config: The model's config.
        model: The model; its parameters may be on the meta device.
        layers: Name of the model's list of decoder layers.
    """
    entries = [entries_of(config, name) for name in ENTRY_PER_BLOCK]
    return tuple(
        (*(of_field[number] for of_field in entries if number < len(of_field)), *map(_part, layer.named_modules()))
        for number, layer in enumerate(model.get_submodule(layers))
    )


def entries_of(config: Any, name: str) -> list[Any]:
    """Return the entries of a config's list; empty if the config has no such list."""
    value = getattr(config, name, None)
    return list(value) if isinstance(value, list | tuple) else []


def _part(named: tuple[str, nn.Module]) -> Hashable:
    """Return what the kind of a block takes from one of its modules: name, class, attributes and shapes."""
    name, module = named
    plain = {key: value for key, value in vars(module).items() if key not in NUMBERS and _is_plain(value)}
    tensors = {**module._parameters, **module._buffers}
    shapes = {key: None if tensor is None else tuple(tensor.shape) for key, tensor in tensors.items()}
    return name, type(module), tuple(sorted(plain.items())), tuple(sorted(shapes.items()))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
