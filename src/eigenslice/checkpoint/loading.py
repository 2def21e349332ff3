"""Loading a whole model by transformers, as its user would."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GgufConfig

from eigenslice.checkpoint.adapters import ADAPTER_CONFIG
from eigenslice.checkpoint.check import check_gguf
from eigenslice.checkpoint.empty import empty_model
from eigenslice.checkpoint.gguf import apart, check_gguf_fits, refuse_lost_rope_scaling
from eigenslice.checkpoint.placing import place_model
from eigenslice.checkpoint.sizes import check_total
from eigenslice.checkpoint.source import load_tokenizer, locate, no_bars, refuse_missing
from eigenslice.checkpoint.towers import TOWERS
from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.errors import CheckpointError, EigensliceError, first_line
from eigenslice.options.common import DtypeName
from eigenslice.runtime.device import resolve_device

NO_ADAPTER = "no-adapter"
"""Folder in which transformers looks for an adapter. It doesn't exist, because adapters are applied afterwards."""


@dataclass(frozen=True)
class LoadedModel:
    """A model to run, dense or sliced, and a function that gives its tokenizer."""

    model: Any
    tokenizer: Callable[[], Any]


def load_model(
    name: str,
    device: str | torch.device | None = None,
    dtype: DtypeName | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model as its user would, by transformers.

    Args:
        name: A folder, a hub id or a .gguf file.
        device: The user's name of a device, see `resolve_device`, or the device that it was resolved to.
        dtype: The dtype; None is float32 on CPU, and on a GPU the stored dtype, or bfloat16 of a GGUF.
        trust_remote_code: Let the checkpoint run code.

    Raises:
        CheckpointError: transformers can't load it.
    """
    target = device if isinstance(device, torch.device) else resolve_device(device)
    folder, gguf = locate(name, adapters=True)
    usual = "float32" if target.type == "cpu" else "bfloat16" if gguf else "auto"
    try:
        with apart(folder, gguf) as (place, extra), no_bars():
            model = _read(name, (folder, gguf), (place, extra), target, dtype or usual, trust_remote_code).eval()
            with torch.no_grad():  # some configs can be built, and not run
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=target), use_cache=False)
    except EigensliceError:
        raise
    except Exception as error:  # whatever configs, safetensors and models raise
        raise _not_loaded(name, error) from error
    return LoadedModel(model, partial(load_tokenizer, name, folder, gguf, trust_remote_code))


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """transformers' config of a folder or hub id.

    Raises:
        CheckpointError: transformers can't load it.
    """
    folder, _ = locate(name, adapters=True)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever configs raise
        raise _not_loaded(name, error) from error


def count_numbers(folder: Path, gguf: str | None) -> int:
    """Return how many numbers the weights in a folder, or in a GGUF file in it, have."""
    if gguf:
        return check_gguf(folder / gguf).numbers
    weights = SafetensorsWeights(folder)
    return sum(math.prod(weights.shape(name)) for name in weights.names())


def _not_loaded(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers can't load {name} ({first_line(error)})",
        allowed="a checkpoint in safetensors, or a .gguf file, that AutoModelForCausalLM loads and runs",
        next_step="check the folder; a model with its own code needs --trust-remote-code",
    )


def _read(
    name: str,
    located: tuple[Path, str | None],
    given: tuple[Path, dict[str, Any]],
    device: torch.device,
    dtype: DtypeName | torch.dtype | str,
    trust_remote_code: bool,
) -> Any:
    """Return the model by transformers' `from_pretrained`, if it has the weights in the files; see `place_model`.

    Args:
        name: The name that the user wrote.
        located: The answer of `locate`.
        given: The folder for transformers, and further arguments.
        device: The device of the model's input.
        dtype: The dtype, in transformers' form.
        trust_remote_code: Let the checkpoint run code.

    Raises:
        CheckpointError: weights are missing, unknown or of other sizes than in the config.
    """
    (folder, gguf), (source, extra) = located, given
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
    config.return_dict = True  # it changes outputs for users' code, not the model's computation
    auto = AutoModelForImageTextToText if config.model_type in TOWERS else AutoModelForCausalLM
    quantized = getattr(config, "quantization_config", None) is not None and not gguf
    if gguf:
        refuse_lost_rope_scaling(folder / gguf, config)
        check_gguf_fits(folder / gguf, config)
        # Where the package `kernels` is, transformers would leave the weights quantized, and so slow to multiply by
        extra = extra | {"quantization_config": GgufConfig(dequantize=True)}
    elif not quantized:
        empty = empty_model(config, auto, trust_remote_code=trust_remote_code)
        check_total(name, sum(p.numel() for p in empty.parameters()), count_numbers(folder, None))
    adapter = not gguf and (folder / ADAPTER_CONFIG).exists()
    place = place_model(name, _bytes(folder, gguf, dtype, quantized=quantized), device, spread=not adapter)
    loaded: Any = auto.from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        adapter_kwargs={"subfolder": NO_ADAPTER},
        **extra,
        **place.keywords,
    )
    model, loading = loaded
    refuse_missing(name, loading, known=not getattr(model, "is_quantized", False))
    if adapter:
        _apply_adapter(name, folder, model)
    return place.settle(model)


def _bytes(folder: Path, gguf: str | None, dtype: DtypeName | torch.dtype | str, *, quantized: bool) -> int:
    """Return the bytes of a model's weights in memory.

    Args:
        folder: The folder of the files.
        gguf: Name of the GGUF in the folder; None for safetensors.
        dtype: The dtype, in transformers' form.
        quantized: True if the weights stay quantized.
    """
    used = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # None is the stored one
    if gguf:
        return check_gguf(folder / gguf).numbers * (used or torch.float32).itemsize
    weights = SafetensorsWeights(folder)
    if quantized:
        return sum(file.stat().st_size for file in weights.files)
    stored = ((math.prod(weights.shape(name)), weights.dtype(name)) for name in weights.names())
    return sum(count * (used or kind or torch.float32).itemsize for count, kind in stored)


def _apply_adapter(name: str, folder: Path, model: Any) -> None:
    """Apply the adapter beside a model's weights, as `from_pretrained` does.

    That forgets, where there is an adapter, which of the model's own weights were missing.

    Raises:
        CheckpointError: the adapter isn't one of this model.
    """
    before = {parameter.data_ptr() for parameter in model.parameters()}
    adapter_info = model.load_adapter(str(folder))
    refuse_missing(name, adapter_info.to_dict())
    for parameter in model.parameters():
        if parameter.data_ptr() not in before:
            parameter.data = parameter.data.to(model.dtype)
