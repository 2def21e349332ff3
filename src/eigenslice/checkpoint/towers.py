"""Checkpoints of models that read images beside text: their language model is a model of its own.

Text alone runs through it as through any other, so that it can be sliced by its own type's table.
"""

import copy
from typing import Any

from transformers import AutoModelForImageTextToText

from eigenslice.arch import has_table
from eigenslice.checkpoint.empty import empty_model

TOWERS = {
    "gemma3": "language_model",
    "gemma4": "language_model",
    "idefics3": "text_model",
    "internvl": "language_model",
    "llava": "language_model",
    "llava_next": "language_model",
    "llava_onevision": "language_model",
    "mistral3": "language_model",
    "smolvlm": "text_model",
}
"""Place of the language model in transformers' models of these types. Tests show that both compute the same on text."""
HEAD = "lm_head"


def holds_tower(config: dict[str, Any]) -> bool:
    """Return whether a config.json describes a model that holds a language model with a table."""
    text = config.get("text_config")
    return str(config.get("model_type")) in TOWERS and isinstance(text, dict) and has_table(text.get("model_type"))


def tower_config(config: Any) -> Any:
    """The language model's config. Whether its embeddings are tied is said by the whole model's."""
    text = copy.deepcopy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def whole_model(config: Any) -> Any:
    """transformers' model of images and text, without weights; raises CheckpointError where it can't be built."""
    return empty_model(config, AutoModelForImageTextToText)


def name_in_tower(name: str, config: Any, prefix: str) -> str | None:
    """Return the name of a whole model's parameter in the language model; None if the parameter is elsewhere.

    Args:
        name: Name of the parameter.
        config: The config of the whole model.
        prefix: Name of the language model's decoder in its causal model, for example "model".
    """
    if name.startswith(HEAD + "."):
        return name
    tower = f"model.{TOWERS[config.model_type]}."
    return f"{prefix}.{name.removeprefix(tower)}" if name.startswith(tower) else None
