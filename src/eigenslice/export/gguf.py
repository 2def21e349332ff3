"""Writing a stock result as a GGUF file for llama.cpp and what is built on it (Ollama, LM Studio and others).

Why not llama.cpp's `convert_hf_to_gguf.py`: it is a script of a source tree, in no package that pip installs, and
changes with it. For Llama-like models the work is small on top of the `gguf` package, which llama.cpp publishes: it has
the names of all tensors and keys, and the writer. What is left is below: a handful of numbers, the order of rows in
query and key, the tokenizer (`gguf_tokenizer.py`) and the number formats (`gguf_types.py`). Each file is then run by
llama.cpp itself and compared with transformers (`check.py`), so that an error here can't go unnoticed.

Tensors are read, converted and written one at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.errors import UnsupportedModelError
from eigenslice.export.gguf_tokenizer import write_tokenizer
from eigenslice.export.gguf_types import GgufType, encode, format_of, is_embedding, stored_dtype, stored_shape

ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds a model_type.

    Attributes:
        arch: Its architecture there.
        interleaved: Whether the two numbers that a rotary angle turns lie side by side in a head (transformers has
            them half a head apart).
        any_width: Whether it runs hidden widths other than heads x head_dim.
    """

    arch: MODEL_ARCH
    interleaved: bool
    any_width: bool = True


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, interleaved=False, any_width=False),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, interleaved=False),
}
ROPE_TYPES = ("default", "linear", "llama3")


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def architecture_of(config: Any) -> Architecture:
    """How llama.cpp holds this model.

    Raises:
        UnsupportedModelError: it doesn't, or not this variant.
    """
    allowed = "results saved as " + ", ".join(ARCHITECTURES)
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UnsupportedModelError(
            f"llama.cpp can't run results saved as {config.model_type!r}, or eigenslice doesn't write them for it",
            allowed=allowed,
            next_step="run it with transformers or vLLM, or export --to openvino (docs/serving.md)",
        )
    width = config.num_attention_heads * head_dim(config)
    if not found.any_width and config.hidden_size != width:
        raise UnsupportedModelError(
            f"llama.cpp refuses {config.model_type!r} at hidden width {config.hidden_size}, other than "
            f"heads x head_dim = {width}",
            allowed=allowed,
            next_step=f"slice to a width that divides by the {config.num_attention_heads} heads: the result is then "
            "saved as llama",
        )
    reasons = list(_variants(config))
    if reasons:
        raise UnsupportedModelError(
            f"llama.cpp's {MODEL_ARCH_NAMES[found.arch]!r} lacks a part of this {config.model_type!r} model: "
            + "; ".join(reasons),
            allowed="full attention, SiLU, rotary angles of type " + ", ".join(ROPE_TYPES),
            next_step="run it with transformers or vLLM, or export --to openvino (docs/serving.md)",
        )
    return found


def _variants(config: Any) -> Iterator[str]:
    layers = set(getattr(config, "layer_types", None) or ())
    windowed = "sliding_attention" in layers if layers else getattr(config, "sliding_window", None) is not None
    if windowed:
        yield f"a sliding window of {config.sliding_window} tokens"
    if config.hidden_act != "silu":
        yield f"the activation {config.hidden_act!r}"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        yield f"rotary angles of type {rope['rope_type']!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "heads that are turned in part"


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias) in the order of interleaved angles, (heads * head_dim, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, (head_dim / 2,); None if all by the same number.

    The ratio of theta^(-2i / head_dim) and what transformers computes.
    """
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return plain / scaled.double()


def _write_parameters(writer: GGUFWriter, config: Any, kind: GgufType, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(kind.file_type)
    if kind.matrices.name.startswith("Q"):
        writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    dim = head_dim(config)
    writer.add_key_length(dim)  # llama.cpp takes hidden / heads otherwise
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its name in the GGUF, its shape, its format, and what gives it."""

    name: str
    shape: tuple[int, ...]
    format: Any
    load: Callable[[], Tensor]


def _entries(config: Any, weights: SafetensorsWeights, arch: Architecture, kind: GgufType) -> Iterator[_Entry]:
    factors = rope_factors(config)
    if factors is not None:
        yield _Entry(ROPE_FREQUENCIES, tuple(factors.shape), format_of(kind, (1,), False), lambda: factors)
    names = get_tensor_name_map(arch.arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for source in weights.names():
        if source.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and source == "lm_head.weight"):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"llama.cpp's {MODEL_ARCH_NAMES[arch.arch]!r} has no place for the tensor {source}",
                allowed="the tensors of a stock " + ", ".join(ARCHITECTURES),
                next_step="check what the folder holds",
            )
        shape = weights.shape(source)
        module = source.split(".")[-2]

        def load(source: str = source, turned: int | None = heads.get(module) if arch.interleaved else None) -> Tensor:
            tensor = weights.load(source).float()
            return interleave(tensor, turned) if turned else tensor

        yield _Entry(name, shape, format_of(kind, shape, is_embedding(source)), load)


def write_gguf(
    path: Path,
    folder: Path,
    config: Any,
    tokenizer: Any,
    kind: GgufType,
    name: str,
    pre: str | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, int]:
    """Write a checkpoint as a GGUF file.

    Args:
        path: The file to write.
        folder: The checkpoint, in safetensors.
        config: Its config.
        tokenizer: transformers' tokenizer.
        kind: What the matrices are stored in.
        name: The model's name, for the file's header.
        pre: llama.cpp's word for how the tokenizer splits text; None finds it.
        progress: Told how many tensors are written.

    Returns:
        The number of matrices in each format.

    Raises:
        UnsupportedModelError: llama.cpp can't run this model, or has no such tokenizer.
    """
    arch = architecture_of(config)
    weights = SafetensorsWeights(folder)
    entries = list(_entries(config, weights, arch, kind))
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch.arch])
    _write_parameters(writer, config, kind, name)
    eos = config.eos_token_id
    ends = [
        number for number in [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])] if number is not None
    ]
    write_tokenizer(writer, tokenizer, config.vocab_size, list(dict.fromkeys(ends)), pre)
    counts: dict[str, int] = {}
    for entry in entries:
        shape, dtype = stored_shape(entry.shape, entry.format), stored_dtype(entry.format)
        size = int(torch.Size(shape).numel()) * dtype().itemsize
        writer.add_tensor_info(entry.name, shape, dtype, size, raw_dtype=entry.format)
        if len(entry.shape) > 1:
            counts[entry.format.name.lower()] = counts.get(entry.format.name.lower(), 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for number, entry in enumerate(entries):
            progress("writing", number, len(entries))
            writer.write_tensor_data(encode(entry.load().contiguous().numpy(), entry.format))
        progress("writing", len(entries), len(entries))
    finally:
        writer.close()
    return counts
