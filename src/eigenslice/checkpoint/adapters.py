"""Adapters (LoRA) in a checkpoint's folder: transformers applies one to the weights beside it without being asked."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from eigenslice.checkpoint.files import check_file, read_json
from eigenslice.errors import CheckpointError, first_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
"""Fields of LoRA as it is; others make peft do something else, such as repeat layers or import modules."""
MERGE = (
    "merge it first: peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), FOLDER)"
    ".merge_and_unload().save_pretrained(NEW), MODEL being what it was trained on; or finetune without --keep-adapter"
)


def refuse_adapter(folder: Path, beside_weights: bool) -> None:
    """Refuse a folder for its adapter.

    Args:
        folder: The folder.
        beside_weights: True if the adapter's base weights are there, too.

    Raises:
        CheckpointError: always.
    """
    what = "holds an adapter beside its weights" if beside_weights else "holds an adapter, and no weights for it"
    raise CheckpointError(
        f"{folder} {what}: an adapter isn't part of the weights, merge it first",
        allowed="a folder in which adapters are merged into the weights",
        next_step=MERGE,
    )


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that can't be applied as it should be, in a folder with the weights that it belongs to.

    Raises:
        CheckpointError: it isn't plain LoRA in safetensors, or is broken, or peft isn't installed.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path, folder, "an adapter_config.json as peft saves it")
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise CheckpointError(
            f"{folder} has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}",
            allowed="adapters in safetensors; pickles can run code and are never read",
            next_step=f"save the adapter again with peft, or remove {ADAPTER_CONFIG}",
        )
    check_file(folder / ADAPTER_WEIGHTS, folder)
    largest = _largest_dimension(folder / ADAPTER_WEIGHTS)
    odd = sorted(field for field, value in config.items() if value and field not in PLAIN)
    odd += [field for field, plain in _checks(config, largest) if not plain]
    if odd:
        raise CheckpointError(
            f"{path} describes an adapter that isn't plain LoRA ({', '.join(odd[:3])})",
            allowed="LoRA as eigenslice finetune --keep-adapter writes it",
            next_step=MERGE,
        )
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"{folder} holds an adapter, and the package peft, which applies adapters, isn't installed",
            allowed="an environment with peft",
            next_step="pip install 'eigenslice[finetune]', or merge the adapter first",
        )


def _checks(config: dict[str, Any], largest: int) -> list[tuple[str, bool]]:
    """Fields, each with a check that its value is plain LoRA's, so that only the adapter's weights can be large."""
    ranks = [config.get("r"), *_values(config.get("rank_pattern"))]
    patterns = [*_keys(config.get("rank_pattern")), *_keys(config.get("alpha_pattern"))]
    modules = config.get("target_modules")
    return [
        ("peft_type", config.get("peft_type") == "LORA"),
        ("r", all(isinstance(rank, int) and 0 < rank <= largest for rank in ranks)),
        ("target_modules", modules == "all-linear" or _is_names(modules)),  # peft takes other text as a pattern
        ("modules_to_save", not config.get("modules_to_save") or _is_names(config["modules_to_save"])),
        ("rank_pattern", all(re.fullmatch(r"[\w.^$\\]*", str(pattern)) for pattern in patterns)),
        ("init_lora_weights", config.get("init_lora_weights") in (True, False, None, "gaussian")),
    ]


def _values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else [None] if pattern else []


def _keys(pattern: Any) -> list[Any]:
    return list(pattern) if isinstance(pattern, dict) else []


def _is_names(modules: Any) -> bool:
    return isinstance(modules, list) and all(isinstance(m, str) and re.fullmatch(r"[\w.]+", m) for m in modules)


def _largest_dimension(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {first_line(error)}",
            allowed="an adapter as peft saves it, complete and unchanged",
            next_step="save the adapter again",
        ) from error
    return max((max(shape, default=1) for shape in shapes), default=1)
