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


SLIDING, FULL = "sliding_attention", "full_attention"


def rope_parameters(config: Any, layer_type: str = FULL) -> dict[str, Any]:
    """transformers' numbers of the rotary angles, of one type of layers where types differ (Gemma 3)."""
    parameters = dense_config(config).rope_parameters
    return parameters.get(layer_type, parameters)


def window_period(config: Any) -> int | None:
    """Number n for which each n-th block has full attention and all others have a sliding window.

    One more than the number of blocks where all blocks have a window; None if no number from 2 on describes the blocks.
    With full attention alone, llama.cpp 2026.10 aborts the process.
    """
    windowed = [kind == SLIDING for kind in config.layer_types]
    for period in range(2, len(windowed) + 2):
        if windowed == [block % period < period - 1 for block in range(len(windowed))]:
            return period
    return None
