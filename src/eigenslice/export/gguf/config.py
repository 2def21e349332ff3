"""Fields that the export reads from a config of a stock type or of eigenslice's class."""

from typing import Any

from eigenslice.modeling import SlicedConfig


def is_custom(config: Any) -> bool:
    """Return whether a model is of eigenslice's class, by its name: a folder's own code makes another class."""
    return config.model_type == SlicedConfig.model_type


def dense_config(config: Any) -> Any:
    """The config that knows rotary angles and vocabulary: in eigenslice's class it is the dense model's.

    Heads may be fewer than there: ask the model's own config for their number.
    """
    return config.text_config if is_custom(config) else config


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    dense = dense_config(config)
    return getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads


def neurons_of(config: Any) -> list[int]:
    """MLP neurons of each block."""
    dense = dense_config(config)
    counts = config.neurons if is_custom(config) else None
    return list(counts or [dense.intermediate_size] * dense.num_hidden_layers)
