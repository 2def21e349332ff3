"""The custom model class for results that are not stock, and its registration with transformers."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from eigenslice.modeling.modeling_eigenslice import SlicedConfig, SlicedForCausalLM, SlicedModel

MODELING_FILE = Path(__file__).with_name("modeling_eigenslice.py")
"""The file that a custom result's folder carries."""

AUTO_MAP = {
    "AutoConfig": "modeling_eigenslice.SlicedConfig",
    "AutoModel": "modeling_eigenslice.SlicedModel",
    "AutoModelForCausalLM": "modeling_eigenslice.SlicedForCausalLM",
}


def register() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` load folders of `model_type` eigenslice."""
    AutoConfig.register(SlicedConfig.model_type, SlicedConfig, exist_ok=True)
    AutoModel.register(SlicedConfig, SlicedModel, exist_ok=True)
    AutoModelForCausalLM.register(SlicedConfig, SlicedForCausalLM, exist_ok=True)


__all__ = ["AUTO_MAP", "MODELING_FILE", "SlicedConfig", "SlicedForCausalLM", "SlicedModel", "register"]
