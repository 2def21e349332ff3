"""Tiny random models of every architecture, in which nothing is accidentally the identity."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
WIDTH = 32
POSITIONS = 64

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = COMMON | {"num_key_value_heads": 2, "intermediate_size": 56, "tie_word_embeddings": False}
OPT = COMMON | {"ffn_dim": 56, "word_embed_proj_dim": WIDTH, "dropout": 0.0, "activation_function": "gelu"}
PHI = COMMON | {"intermediate_size": 56, "num_key_value_heads": 2, "tie_word_embeddings": False}
NEOX = COMMON | {"intermediate_size": 56, "tie_word_embeddings": False, "rotary_pct": 0.5}


@dataclass(frozen=True)
class Case:
    """One variant of an architecture, and what its results are saved as at a width that the type accepts."""

    model_type: str
    config: dict[str, Any]
    stock: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """The dense model, in evaluation mode."""
        return tiny_model(self.model_type, self.config | self.extra, dtype)

    @property
    def tied(self) -> bool:
        return AutoConfig.for_model(self.model_type, **self.config | self.extra).tie_word_embeddings


CASES = {
    "llama": Case("llama", LLAMA, "llama"),
    "llama-tied": Case("llama", LLAMA, "llama", {"tie_word_embeddings": True}),
    "llama-biased": Case("llama", LLAMA, "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": Case("llama", LLAMA, "llama", {"head_dim": 12}),
    "mistral": Case("mistral", LLAMA, "mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral-window": Case("mistral", LLAMA, "mistral", {"sliding_window": 6}),
    "qwen2": Case("qwen2", LLAMA, "llama"),
    "qwen2-tied": Case("qwen2", LLAMA, "llama", {"tie_word_embeddings": True}),
    "qwen2-window": Case(
        "qwen2", LLAMA, "qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "qwen3": Case("qwen3", LLAMA, "qwen3", {"head_dim": 12}),
    "qwen3-tied": Case("qwen3", LLAMA, "qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "opt": Case("opt", OPT),
    "opt-untied": Case("opt", OPT, None, {"tie_word_embeddings": False}),
    "opt-plain-norms": Case("opt", OPT, None, {"layer_norm_elementwise_affine": False}),
    "opt-no-biases": Case("opt", OPT, None, {"enable_bias": False}),
    "phi": Case("phi", PHI, "phi"),
    "phi-tied": Case("phi", PHI, None, {"tie_word_embeddings": True}),
    "phi-qk-norm": Case("phi", PHI, None, {"qk_layernorm": True}),
    "gpt_neox": Case("gpt_neox", NEOX),
    "gpt_neox-sequential": Case("gpt_neox", NEOX, None, {"use_parallel_residual": False}),
    "gpt_neox-tied": Case("gpt_neox", NEOX, None, {"tie_word_embeddings": True}),
}


def tiny_model(model_type: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, norm gains away from 1, and shifts and biases away from 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embed" in name:
                parameter.copy_(0.5 + noise)  # a mean that centring has to remove
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def save(model: Any, folder: Path) -> Path:
    """Save a model as transformers does."""
    model.save_pretrained(folder)
    return folder


def random_ids(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def structured_ids(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """Token ids of which each has only four successors, so that streams are far from isotropic."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 4, (rows, tokens), generator=generator)
    ids = [torch.randint(0, VOCABULARY - 3, (rows,), generator=generator)]
    for step in steps.T[1:]:
        ids.append((5 * ids[-1] + step * step) % (VOCABULARY - 3))
    return torch.stack(ids, dim=1) + 3


def calibration_file(folder: Path, rows: int = 12, tokens: int = 24) -> Path:
    """Random token ids as a calibration file."""
    path = folder / "calibration.safetensors"
    save_file({"calibration": random_ids(rows, tokens)}, path)
    return path


def save_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of single characters, as transformers 5 writes it."""
    words = ["<pad>", "<s>", "</s>", *(chr(code) for code in range(33, 33 + VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder
