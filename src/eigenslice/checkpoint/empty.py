"""transformers' model of a config without memory for its weights: names and shapes of a checkpoint's tensors."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from eigenslice.errors import CheckpointError, first_line

TABLES = 2**28
"""Numbers that a model may compute and keep beside its parameters, such as the angles of all positions."""


def empty_model(config: Any, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """transformers' model of a config, with parameters on the meta device.

    Args:
        config: The config.
        auto: transformers' class that finds the model's class.
        options: Keywords for `from_config` of this class.

    Raises:
        CheckpointError: transformers can't build it, or only with tables larger than its parameters.
    """
    try:
        with torch.device("meta"), no_init_weights():  # nobody reads them, and even without numbers they take time
            model = auto.from_config(copy.deepcopy(config), **options)
    except Exception as error:  # whatever a model's constructor raises on a config that it doesn't expect
        raise CheckpointError(
            f"transformers can't build the {config.model_type} model that the config describes ({first_line(error)})",
            allowed="a config of a model that transformers can build",
            next_step="check config.json",
        ) from error
    parameters, tables = (sum(t.numel() for t in of()) for of in (model.parameters, model.buffers))
    if tables > max(parameters, TABLES):
        raise CheckpointError(
            f"the {config.model_type} model that the config describes has tables of {tables:,} numbers",
            allowed=f"as many as its {parameters:,} parameters, or {TABLES:,}",
            next_step="check the largest position and the like in config.json",
        )
    return model
