"""Tiny models with a tokenizer that llama.cpp has, wide enough for blocks of 32 numbers."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

from eigenslice.export.gguf.llama_cpp import LlamaCpp
from tests import tiny
from tests.results import load

SPLITS = {  # as in the tokenizer.json of Llama 3, Qwen2 and Mistral Nemo
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
SPECIAL = ["<pad>", "<s>", "</s>"]
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "t"), ("1", "2")]
VOCABULARY = 272
CONFIG = tiny.LLAMA | {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 20}),
}
"""Cases that eigenslice's class is exported from, too."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
    "partial_rotary_factor": 0.5,
}
HEADS = {"head_dim": 12}
PHI3: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", HEADS | {"sliding_window": 64}),  # as long as a text can be
    "phi3-tied": ("phi3", HEADS | {"tie_word_embeddings": True}),
    "phi3-rope-partial": ("phi3", HEADS | {"rope_parameters": tiny.ROPE | {"partial_rotary_factor": 0.5}}),
    # llama.cpp goes by the context that it is given, 256 here, transformers by the tokens of a text
    "phi3-rope-short": (
        "phi3",
        HEADS
        | {
            "max_position_embeddings": 1024,
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 512},
        },
    ),
    "phi3-rope-long": ("phi3", HEADS | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}}),
}
"""Cases of Phi-3. transformers' Phi3Config has longrope at hidden width = heads x head_dim only, so that sliced models
with it are saved as eigenslice's class."""
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = tiny.EXPERTS | HEADS | {"norm_topk_prob": True}
SQUARE = {"head_dim": 8}
"""For what llama.cpp runs at one width only: heads x head_dim is the width of the sliced model."""
QWEN2_MOE = tiny.EXPERTS | SQUARE | {"shared_expert_intermediate_size": 40}
STOCK: dict[str, tuple[str, dict[str, Any]]] = PHI3 | {
    "gemma": ("gemma", HEADS | {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe-tied": ("qwen3_moe", EXPERTS | {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", HEADS | {"num_local_experts": 12}),  # in files 10 comes before 2
    "mixtral-rope-llama3": ("mixtral", HEADS | {"num_local_experts": 4, "rope_parameters": LLAMA3}),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "starcoder2": ("starcoder2", SQUARE),
    "granite": ("granite", HEADS | tiny.GRANITE),
    "granite-tied": ("granite", HEADS | tiny.GRANITE | {"tie_word_embeddings": True}),
    "granite-biased": ("granite", HEADS | tiny.GRANITE | BIASES),
    "granite-rope-llama3": ("granite", HEADS | tiny.GRANITE | {"rope_parameters": LLAMA3}),
    "smollm3": ("smollm3", HEADS | {"num_hidden_layers": 5}),
    "smollm3-tied": ("smollm3", HEADS | {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "arcee": ("arcee", HEADS),
    "arcee-rope-llama3": ("arcee", HEADS | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "seed_oss": ("seed_oss", HEADS),
    "seed_oss-biased": ("seed_oss", HEADS | {"attention_out_bias": True, "mlp_bias": True}),
    "ernie4_5": ("ernie4_5", HEADS),
    "ernie4_5-biased": ("ernie4_5", HEADS | {"tie_word_embeddings": True, "use_bias": True}),
    "phi": ("phi", SQUARE),
}
"""Cases of further types, which are exported in stock form only."""
GEMMA3 = HEADS | {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "sliding_window": 6,
    "query_pre_attn_scalar": 12,
    "rope_parameters": {"sliding_attention": tiny.ROPE | {"rope_theta": 500.0}, "full_attention": LINEAR},
    "tie_word_embeddings": True,
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("gemma3_text", GEMMA3),
    "gemma3_text-untied": ("gemma3_text", GEMMA3 | {"tie_word_embeddings": False}),
    "gemma3_text-windows": ("gemma3_text", GEMMA3 | {"layer_types": ["sliding_attention"] * 5}),
}
"""Cases of types that are stock at the whole hidden width only: neurons, heads and blocks are cut."""


def tokenizer(split: str = "gpt-2", bos: bool = False) -> Any:
    """A byte-level BPE tokenizer with a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    steps: dict[str, Any] = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }
    for name, pattern in SPLITS.items():
        steps[name] = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    inner.pre_tokenizer = steps[split]
    inner.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos_token=bos
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def save(folder: Path, case: str = "llama", split: str = "gpt-2", **config: Any) -> Path:
    """Save a dense model of a case with its tokenizer."""
    model_type, extra = (CASES | STOCK | WHOLE)[case]
    model = tiny.tiny_model(model_type, CONFIG | extra | config)
    tokenizer(split).save_pretrained(folder)
    return tiny.save(model, folder)


class GgmlGelu(torch.nn.Module):
    """GELU as ggml computes it on a CPU: from a table of float16, outside of [-10, 10] as 0 or x."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values.abs() < 10, looked_up, values.relu())


def expected_log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers predicts after each prefix, (tokens, vocabulary), with ggml's GELU where there is one."""
    model = load(folder)
    if any(str(getattr(model.config, name, "")).startswith("gelu") for name in ("hidden_act", "hidden_activation")):
        for module in model.modules():
            for name in ("act_fn", "activation_fn"):
                if hasattr(module, name):
                    setattr(module, name, GgmlGelu())
    with torch.no_grad():
        return model(ids).logits[0].log_softmax(-1)


def log_probabilities(path: Path, ids: list[int]) -> torch.Tensor:
    """What llama.cpp predicts after each prefix: (tokens, vocabulary)."""
    rows = torch.full((len(ids), VOCABULARY), float("nan"))
    with LlamaCpp(path, exact=True) as runtime:
        for i in range(len(ids)):
            for token, value in runtime.next_tokens(ids[: i + 1], VOCABULARY).items():
                rows[i, token] = value
    return rows
