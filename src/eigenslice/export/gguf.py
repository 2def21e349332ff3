"""Writing a result as a GGUF file for llama.cpp and what is built on it (Ollama, LM Studio and others).

Why not llama.cpp's `convert_hf_to_gguf.py`: it is a script of a source tree, in no package that pip installs, and
changes with it. For Llama-like models the work is small on top of the `gguf` package, which llama.cpp publishes: it has
the names of all tensors and keys, and the writer. What is left is below: a handful of numbers, the order of rows in
query and key, llama.cpp's architecture (`gguf_arch.py`), the tokenizer (`gguf_tokenizer.py`) and the number formats
(`gguf_types.py`). Each file is then run by llama.cpp itself and compared with transformers (`check.py`), so that an
error here can't go unnoticed.

Tensors are read, converted and written one at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.errors import UnsupportedModelError
from eigenslice.export.gguf_arch import (
    ALLOWED,
    Architecture,
    architecture_of,
    dense_config,
    epsilon_of,
    head_dim,
    is_custom,
    neurons_of,
)
from eigenslice.export.gguf_tokenizer import write_tokenizer
from eigenslice.export.gguf_types import GgufType, encode, format_of, is_embedding, stored_dtype, stored_shape

ROPE_FREQUENCIES = "rope_freqs.weight"


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias) in the order of interleaved angles, (heads * head_dim, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, (head_dim / 2,); None if all by the same number.

    The ratio of theta^(-2i / head_dim) and what transformers computes.
    """
    dense = dense_config(config)
    if dense.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](dense, torch.device("cpu"))
    dim = head_dim(config)
    plain = dense.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return plain / scaled.double()


def _write_parameters(writer: GGUFWriter, config: Any, arch: Architecture, kind: GgufType, name: str) -> None:
    dense = dense_config(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(kind.file_type)
    if kind.matrices.name.startswith("Q"):
        writer.add_quantization_version(2)
    writer.add_vocab_size(dense.vocab_size)
    writer.add_context_length(dense.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(dense.num_hidden_layers)
    neurons, heads, kv_heads = neurons_of(config), config.num_attention_heads, config.num_key_value_heads
    writer.add_feed_forward_length(neurons if arch.counted else neurons[0])
    writer.add_head_count([heads] * len(neurons) if arch.counted else heads)
    writer.add_head_count_kv([kv_heads] * len(neurons) if arch.counted else kv_heads)
    dim = head_dim(config)
    writer.add_key_length(dim)  # llama.cpp takes hidden / heads otherwise
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(epsilon_of(config))
    rope = dense.rope_parameters
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


def _gainless(config: Any, names: set[str]) -> Iterator[str]:
    """Norms of eigenslice's class that have no gain, by the names that stock models have for them."""
    layers = range(dense_config(config).num_hidden_layers)
    blocks = [
        f"model.layers.{i}.{norm}.weight" for i in layers for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    return (name for name in (*blocks, "model.norm.weight") if name not in names)


def _entries(config: Any, weights: SafetensorsWeights, arch: Architecture, kind: GgufType) -> Iterator[_Entry]:
    factors = rope_factors(config)
    if factors is not None:
        yield _Entry(ROPE_FREQUENCIES, tuple(factors.shape), format_of(kind, (1,), False), lambda: factors)
    dense = dense_config(config)
    names = get_tensor_name_map(arch.arch, dense.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    # eigenslice's class has the dense architecture's model in itself
    sources = {name.removeprefix("model.") if is_custom(config) else name: name for name in weights.names()}
    for source, stored in sources.items():
        if source.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and source == "lm_head.weight"):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"llama.cpp's {arch.name!r} has no place for the tensor {stored}",
                allowed=ALLOWED,
                next_step="check what the folder holds",
            )
        shape = weights.shape(stored)
        module = source.split(".")[-2]

        def load(stored: str = stored, turned: int | None = heads.get(module) if arch.interleaved else None) -> Tensor:
            tensor = weights.load(stored).float()
            return interleave(tensor, turned) if turned else tensor

        yield _Entry(name, shape, format_of(kind, shape, is_embedding(source)), load)
    if is_custom(config):
        width = config.hidden_size
        for source in _gainless(config, set(sources)):
            name = names.get_name(source, try_suffixes=(".weight",))
            assert name is not None
            yield _Entry(name, (width,), format_of(kind, (width,), False), lambda: torch.ones(width))


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
    writer = GGUFWriter(path, arch.name)
    _write_parameters(writer, config, arch, kind, name)
    eos = dense_config(config).eos_token_id
    ends = [
        number for number in [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])] if number is not None
    ]
    write_tokenizer(writer, tokenizer, dense_config(config).vocab_size, list(dict.fromkeys(ends)), pre)
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
