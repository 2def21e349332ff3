"""Writing a tiny Llama as a GGUF, as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from torch import Tensor

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NORMAL = [*map(chr, range(ord("!"), ord("!") + 91)), "ab"]
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order: what one angle turns, side by side."""
    halves = weight.view(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def tensors_of(model: Any) -> dict[str, Tensor]:
    """A Llama's tensors by their names in a GGUF."""
    config, state = model.config, model.state_dict()
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in OUTER.items()}
    if config.tie_word_embeddings:
        del names["output.weight"]
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in INNER.items()}
    tensors = {theirs: state[ours] for theirs, ours in names.items()}
    for name, tensor in tensors.items():
        if ".attn_q." in name:
            tensors[name] = interleaved(tensor, config.num_attention_heads)
        elif ".attn_k." in name:
            tensors[name] = interleaved(tensor, config.num_key_value_heads)
    return tensors


def write_gguf(
    model: Any, path: Path, stored: GGMLQuantizationType = GGMLQuantizationType.F32, omit: str | None = None
) -> Path:
    """Write a tiny Llama with a tokenizer of single characters.

    Args:
        model: transformers' model.
        path: The file to write.
        stored: Type of the matrices whose rows it can hold; everything else is float32.
        omit: A tensor to leave out.
    """
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(SPECIAL + NORMAL)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * len(NORMAL))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors_of(model).items():
        if name == omit:
            continue
        array = tensor.float().numpy().copy()
        if array.ndim == 1 or array.shape[1] % 32 or stored == GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        elif stored == GGMLQuantizationType.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
