"""The check of a folder or a GGUF file, before anyone reads it.

slice reads checkpoints itself; the other verbs read them through transformers. Both read the same in a checkpoint that
passes this check. The check accepts a subset of transformers' checkpoints.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eigenslice.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, refuse_adapter
from eigenslice.checkpoint.files import LARGEST_JSON, LARGEST_VOCABULARY, check_file, read_json
from eigenslice.checkpoint.gguf_header import BLOCK, GgufHeader, read_header
from eigenslice.checkpoint.sizes import LARGEST, POSITIONS, check_config
from eigenslice.checkpoint.weights import INDEX, SINGLE, SafetensorsWeights
from eigenslice.errors import CheckpointError, first_line

CONFIG = "config.json"
OPENED = re.compile(
    r".*\.(json|safetensors|model|jinja|tiktoken|py|spm)|(vocab|merges)\.txt|README\.md|LICENSE.*|USE_POLICY.*"
)
"""Names that readers of checkpoints open, or copy."""
VOCABULARIES = re.compile(r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|tekken\.json|.*\.(model|tiktoken|spm)")
CONFIGS = re.compile(
    r"(config|generation_config|\w*_config|adapter_config|special_tokens_map|added_tokens)\.json|.*\.jinja"
)
TEMPLATES = "additional_chat_templates"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of files that transformers reads before all others."""
ELSEWHERE = ("transformers_weights", "configuration_files")
"""Fields of a config.json that make transformers read other files."""
CODE = ("attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation")
"""Fields that may name a repository with code."""


def check_folder(folder: Path, adapters: bool = False) -> None:
    """Refuse a folder that isn't a checkpoint in safetensors, or of which two readers would read different things.

    Only names, JSON files and the headers of weights are read.

    Args:
        folder: The folder.
        adapters: True if an adapter may lie beside the weights; the adapter is applied then.

    Raises:
        CheckpointError: it can't be read as it is.
    """
    names = list_folder(folder)
    _check_names(folder, names)
    if CONFIG not in names:
        if {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin"} & set(names):
            refuse_adapter(folder, beside_weights=False)
        raise CheckpointError(
            f"{folder} has no {CONFIG}",
            allowed="a folder as transformers saves it",
            next_step=f"pass the folder that holds {CONFIG} and the weights",
        )
    config = read_config(folder)
    if ADAPTER_CONFIG in names:
        if not {SINGLE, INDEX} & set(names):
            refuse_adapter(folder, beside_weights=False)
        if not adapters:
            refuse_adapter(folder, beside_weights=True)
        check_adapter(folder)
    weights = SafetensorsWeights(folder)
    if config.get("quantization_config") is None:
        _check_dtypes(folder, weights)
    check_config(str(folder), config, {name: weights.shape(name) for name in weights.names()})


def list_folder(folder: Path) -> list[str]:
    """Names in a folder.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder} can't be read ({first_line(error)})",
            allowed="a folder that this user may read",
            next_step="check its permissions",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Content of config.json.

    Raises:
        CheckpointError: it is none, or sends readers to other files.
    """
    path = folder / CONFIG
    config = read_json(path, folder, 'JSON with a "model_type"')
    if "model_type" not in config:
        raise CheckpointError(
            f"{path} can't be read (it has no model_type)",
            allowed='JSON with a "model_type"',
            next_step="download or save the checkpoint again",
        )
    other = [field for field in ELSEWHERE if config.get(field)]
    other += [field for field in _repositories(config) if field not in other]
    if other:
        raise CheckpointError(
            f"{path} has the field {other[0]}, which sends readers to other files",
            allowed=f"weights in {SINGLE} or in the shards of {INDEX}, and attention that transformers has itself",
            next_step=f"remove {other[0]} from {CONFIG}, or save the checkpoint again",
        )
    return config


def _repositories(config: Mapping[str, Any]) -> list[str]:
    """Return fields, of the config and of nested configs, that name code in a repository."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return [field for part in parts for field in CODE if "/" in str(part.get(field) or "")]


def _check_names(folder: Path, names: list[str]) -> None:
    """Refuse pipes, devices, links that lead elsewhere, and files that are too large for their kind."""
    paths = [folder / name for name in names if OPENED.fullmatch(name)]
    if TEMPLATES in names and (folder / TEMPLATES).is_dir():
        paths += [folder / TEMPLATES / name for name in list_folder(folder / TEMPLATES)]
    for path in paths:
        vocabulary, config = VOCABULARIES.fullmatch(path.name), CONFIGS.fullmatch(path.name)
        if not path.is_dir() or config or path.name in (SINGLE, INDEX, ADAPTER_WEIGHTS):
            check_file(path, folder, LARGEST_JSON if config else LARGEST_VOCABULARY if vocabulary else None)
    distributed = [name for name in names if DISTRIBUTED.fullmatch(name)]
    if distributed:
        raise CheckpointError(
            f"{folder} holds a distributed checkpoint ({distributed[0]})",
            allowed=f"weights in {SINGLE} or in the shards of {INDEX}",
            next_step="load it with transformers and save it with save_pretrained",
        )


def _check_dtypes(folder: Path, weights: SafetensorsWeights) -> None:
    """Refuse matrices of integers or 8-bit floats: transformers would take them as they are, without their scales."""
    odd = sorted(name for name in weights.names() if name.endswith(".weight") and weights.dtype(name) is None)
    if odd:
        raise CheckpointError(
            f"{folder}: {odd[0]} is stored as integers or 8-bit floats, and config.json has no quantization_config",
            allowed="float32, float16 or bfloat16 weights",
            next_step="slice the unquantized checkpoint and quantize the result",
        )


def check_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, if it isn't broken and its header and tensors agree.

    Raises:
        CheckpointError: it is.
    """
    check_file(path, None)
    header = read_header(path)
    for field, value in header.fields.items():
        if field.startswith(header.architecture + "."):
            _check_field(path, header, field, value)
    blocks = header.of_architecture("block_count")
    numbers = {int(match[1]) for name in header.tensors if (match := BLOCK.match(name))}
    if not isinstance(blocks, int) or len(numbers) != blocks or numbers != set(range(len(numbers))):
        raise _contradiction(path, f"its header says {blocks} blocks, its tensors are those of {len(numbers)}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding:
        _check_embedding(path, header, embedding.shape)
    return header


def _check_field(path: Path, header: GgufHeader, field: str, value: Any) -> None:
    """Refuse counts and sizes that no tensor has."""
    largest = max((max(tensor.shape) for tensor in header.tensors.values()), default=1)
    name = field.removeprefix(header.architecture + ".")
    values = value if isinstance(value, list) else [value]
    whole = [v for v in values if isinstance(v, int)]
    if name.endswith(("head_count", "head_count_kv")):
        bad = not whole or not 0 < max(whole) <= largest or min(whole) < 0
    elif name in ("embedding_length", "attention.key_length", "attention.value_length", "vocab_size"):
        bad = not whole or not 0 < max(whole) <= largest
    elif name == "context_length":
        bad = not whole or not 0 < max(whole) <= POSITIONS
    elif name in ("rope.freq_base", "rope.scaling.factor"):
        bad = not all(isinstance(v, int | float) and 0 < v < float("inf") for v in values)
    elif name.endswith("epsilon"):
        bad = not all(isinstance(v, int | float) and 0 <= v < float("inf") for v in values)
    else:
        bad = any(abs(v) > LARGEST for v in whole)
    if bad:
        raise _contradiction(path, f"its {field} is {value!r:.60}")


def _check_embedding(path: Path, header: GgufHeader, shape: tuple[int, ...]) -> None:
    """Compare the embedding with the header's width and vocabulary."""
    width, tokens = header.of_architecture("embedding_length"), header.fields.get("tokenizer.ggml.tokens")
    vocabulary = header.of_architecture("vocab_size")
    if width is not None and shape[-1] != width:
        raise _contradiction(path, f"its header says width {width}, token_embd.weight is {shape}")
    if vocabulary is not None and shape[0] != vocabulary:
        raise _contradiction(path, f"its header says {vocabulary} tokens, token_embd.weight is {shape}")
    if isinstance(tokens, list) and len(tokens) > shape[0]:
        raise _contradiction(path, f"its vocabulary has {len(tokens)} tokens, token_embd.weight is {shape}")


def _contradiction(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        allowed="a GGUF whose header and tensors belong together",
        next_step="convert or download the file again",
    )
