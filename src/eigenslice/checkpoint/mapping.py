"""The checkpoint's tensors behind each parameter of transformers' model.

Checkpoints of mixtures of experts hold each expert's matrices. transformers' model holds all experts in one tensor. The
conversion is transformers' own.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from eigenslice.arch import lookup
from eigenslice.checkpoint.source import Source
from eigenslice.checkpoint.towers import name_in_tower, whole_model
from eigenslice.checkpoint.weights import LEFTOVERS, Weights
from eigenslice.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """The origin of one parameter.

    Attributes:
        stored: Names of the checkpoint's tensors.
        patterns: The converter's source pattern for each tensor; None without a converter.
        converter: The converter that makes the parameter from several tensors.
        name: Name of the parameter.
        model: transformers' model, without weights.
    """

    stored: tuple[str, ...]
    patterns: tuple[str | None, ...]
    converter: WeightConverter | None
    name: str
    model: Any

    def _make(self, tensors: list[Tensor]) -> Tensor:
        if self.converter is None:
            return tensors[0]
        converter: Any = copy.deepcopy(self.converter)
        for stored, pattern, tensor in zip(self.stored, self.patterns, tensors, strict=True):
            converter.add_tensor(self.name, stored, pattern, tensor)
        made = converter.convert(self.name, model=self.model, config=self.model.config)[self.name]
        return made[0] if isinstance(made, list) else made

    def load(self, weights: Weights) -> Tensor:
        """The parameter, in the dtype that it is stored in."""
        return self._make([weights.load(name) for name in self.stored])

    def rows(self, weights: Weights, count: int) -> Iterator[Tensor]:
        """The parameter in pieces of so many rows."""
        if self.converter is None:
            return weights.rows(self.stored[0], count)
        return iter(self.load(weights).split(count))

    def shape(self, weights: Weights) -> tuple[int, ...]:
        """Its shape, without reading it.

        Raises:
            RuntimeError: its parts don't fit each other.
        """
        return tuple(self._make([torch.empty(weights.shape(name), device="meta") for name in self.stored]).shape)

    def dtype(self, weights: Weights) -> torch.dtype | None:
        """Its dtype; None if a part has none that can be sliced."""
        dtypes = {weights.dtype(name) for name in self.stored}
        return None if None in dtypes else next(iter(dtypes))


def origins(source: Source, model: Any) -> dict[str, Origin]:
    """Map the names of a model's parameters and buffers to a checkpoint's tensors; every tensor has to fit.

    Raises:
        CheckpointError: tensors are missing or unknown.
    """
    whole = model if source.whole is None else whole_model(source.whole)
    state = whole.state_dict()
    transforms = get_model_conversion_mapping(whole)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    ignored = [re.compile(pattern) for pattern in whole._keys_to_ignore_on_load_unexpected or ()]
    parts_of: dict[str, list[tuple[str, str | None]]] = {}
    unknown = []
    for stored in sorted(source.weights.names(), key=dot_natural_key):
        if source.gguf:
            name, pattern = stored, None
        else:
            name, pattern = rename_source_key(stored, renamings, converters, whole.base_model_prefix, state)
        if name in state:
            parts_of.setdefault(name, []).append((stored, pattern))
        elif not LEFTOVERS.search(stored) and not any(pattern.search(name) for pattern in ignored):
            unknown.append(stored)
    names: dict[str, Origin] = {}
    for name, parts in parts_of.items():
        inner = name if source.whole is None else name_in_tower(name, source.whole, model.base_model_prefix)
        if inner is not None:
            names[inner] = Origin(
                tuple(stored for stored, _ in parts),
                tuple(pattern for _, pattern in parts),
                by_pattern.get(parts[0][1]) if parts[0][1] else None,
                name,
                whole,
            )
    table = lookup(source.config)
    ends = [table.embeddings[0] + ".weight", table.lm_head + ".weight"]
    if source.config.tie_word_embeddings and any(name in names for name in ends):
        # Checkpoints of tied models hold the embedding, the head, or both
        present = next(name for name in ends if name in names)
        for name in ends:
            names.setdefault(name, names[present])
    missing = sorted(set(model.state_dict()) - set(names))
    if missing or unknown:
        said = [f"lacks {len(missing)} tensors ({', '.join(missing[:3])})"] if missing else []
        said += [f"has {len(unknown)} unknown ones ({', '.join(sorted(unknown)[:3])})"] if unknown else []
        raise CheckpointError(
            f"{source.name} {' and '.join(said)}",
            allowed=f"exactly the weights of transformers' {type(whole).__name__}",
            next_step="download or save the checkpoint again; merge adapters into the weights first",
        )
    return names


def as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some tensors of a model under the names, and in the parts, that its checkpoints have on the hub.

    Args:
        model: transformers' model; only its type and config matter.
        tensors: Under its own names; on the meta device, too.
    """
    return revert_weight_conversion(model, tensors)
