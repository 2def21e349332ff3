"""transformers' model of a config without memory for its weights: what names and shapes a checkpoint must have."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from eigenslice.errors import CheckpointError


def empty_model(config: Any, auto: Any = AutoModelForCausalLM) -> Any:
    """transformers' model of a config, with parameters on the meta device.

    Args:
        config: The config.
        auto: transformers' class that finds the model's.

    Raises:
        CheckpointError: transformers can't build it.
    """
    try:
        with torch.device("meta"), no_init_weights():  # nobody reads them, and even without numbers they take time
            return auto.from_config(copy.deepcopy(config))
    except Exception as error:  # whatever a model's constructor raises on a config that it doesn't expect
        raise CheckpointError(
            f"transformers can't build the {config.model_type} model that the config describes "
            f"({type(error).__name__}: {error})",
            allowed="a config of a model that transformers can build",
            next_step="check config.json",
        ) from error
