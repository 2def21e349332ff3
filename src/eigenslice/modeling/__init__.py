"""The custom model class for results that are not stock, and its registration with transformers."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from eigenslice.modeling.modeling_eigenslice import (
    AUTO_MAP,
    SlicedConfig,
    SlicedForCausalLM,
    SlicedForSequenceClassification,
    SlicedForTokenClassification,
    SlicedModel,
)

MODELING_FILE = Path(__file__).with_name("modeling_eigenslice.py")
"""The file that a custom result's folder carries."""
CLASSES = {
    AutoModel: SlicedModel,
    AutoModelForCausalLM: SlicedForCausalLM,
    AutoModelForSequenceClassification: SlicedForSequenceClassification,
    AutoModelForTokenClassification: SlicedForTokenClassification,
}


def register() -> None:
    """Let transformers' auto classes load folders of `model_type` eigenslice, and save the file with such a model."""
    AutoConfig.register(SlicedConfig.model_type, SlicedConfig, exist_ok=True)
    SlicedConfig.register_for_auto_class()
    for auto, model in CLASSES.items():
        auto.register(SlicedConfig, model, exist_ok=True)
        model.register_for_auto_class(auto)


__all__ = ["AUTO_MAP", "MODELING_FILE", "SlicedConfig", "SlicedForCausalLM", "SlicedModel", "register"]
