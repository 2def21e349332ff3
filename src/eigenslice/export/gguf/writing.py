"""Writing a result as a GGUF file for llama.cpp and its users (Ollama, LM Studio and others).

llama.cpp's `convert_hf_to_gguf.py` isn't used: it is a script of a source tree, in no package that pip installs. The
work is small on top of llama.cpp's `gguf` package, which has the names of all tensors and keys, and the writer. The
rest is the architecture (`arch.py`, `table.py`), a handful of numbers (below), the tensors (`tensors.py`, `rope.py`),
the tokenizer (`tokenizer.py`) and the number formats (`types.py`). llama.cpp then runs each file, and the result is
compared with transformers (`agreement.py`). So an error here can't go unnoticed.

Tensors are read, converted and written one at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType

from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.export.gguf.arch import architecture_of
from eigenslice.export.gguf.config import (
    SLIDING,
    dense_config,
    head_dim,
    is_custom,
    neurons_of,
    rope_parameters,
    window_period,
)
from eigenslice.export.gguf.rope import rope_type, rotary_dim
from eigenslice.export.gguf.table import Architecture
from eigenslice.export.gguf.tensors import entries
from eigenslice.export.gguf.tokenizer import write_tokenizer
from eigenslice.export.gguf.types import GgufType, encode, stored_dtype, stored_shape


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
    epsilon = config.norm_eps if is_custom(config) else getattr(config, arch.epsilon)
    (writer.add_layer_norm_eps if arch.layer_norm else writer.add_layer_norm_rms_eps)(epsilon)
    for method, field in arch.keys.items():
        getattr(writer, method)(getattr(dense, field))
    # Interleaved heads are rotated as a whole, by factors that leave a part as it is
    writer.add_rope_dimension_count(dim if arch.interleaved else rotary_dim(config))
    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch.windows:
        period = window_period(dense)
        assert period is not None  # others are refused, see arch.py
        writer.add_sliding_window(dense.sliding_window)
        writer.add_sliding_window_pattern(period)
        writer.add_rope_freq_base_swa(rope_parameters(config, SLIDING)["rope_theta"])
    if rope_type(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope_type(config) == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to write as a GGUF file.

    Attributes:
        folder: Folder of the safetensors.
        config: transformers' config.
        tokenizer: transformers' tokenizer.
        name: Name of the model, for the file's header.
        pre: llama.cpp's word for the way of splitting text; None finds it.
    """

    folder: Path
    config: Any
    tokenizer: Any
    name: str
    pre: str | None = None


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    kind: GgufType,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, int]:
    """Write a checkpoint as a GGUF file.

    Args:
        path: The file to write.
        checkpoint: The checkpoint.
        kind: Type that the matrices are stored in.
        progress: Called with the number of written tensors.

    Returns:
        The number of matrices in each format.

    Raises:
        UnsupportedModelError: llama.cpp can't run this model, or has no such tokenizer.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    arch = architecture_of(config)
    weights = SafetensorsWeights(checkpoint.folder)
    tensors = list(entries(config, weights, arch, kind))
    writer = GGUFWriter(path, arch.name)
    _write_parameters(writer, config, arch, kind, checkpoint.name)
    eos = dense_config(config).eos_token_id
    ends = [
        number for number in [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])] if number is not None
    ]
    write_tokenizer(writer, tokenizer, dense_config(config).vocab_size, list(dict.fromkeys(ends)), checkpoint.pre)
    counts: dict[str, int] = {}
    for entry in tensors:
        shape, dtype = stored_shape(entry.shape, entry.format), stored_dtype(entry.format)
        size = int(torch.Size(shape).numel()) * dtype().itemsize
        writer.add_tensor_info(entry.name, shape, dtype, size, raw_dtype=entry.format)
        if len(entry.shape) > 1:
            counts[entry.format.name.lower()] = counts.get(entry.format.name.lower(), 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for number, entry in enumerate(tensors):
            progress("writing", number, len(tensors))
            writer.write_tensor_data(encode(entry.load().contiguous().numpy(), entry.format))
        progress("writing", len(tensors), len(tensors))
    finally:
        writer.close()
    return counts
