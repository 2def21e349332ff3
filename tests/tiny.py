"""Tiny random models of every architecture, in which nothing is accidentally the identity."""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from eigenslice.arch import TABLES

VOCABULARY = 96
WIDTH = 32
POSITIONS = 64
NORM = re.compile(r"(norm\w*|ln_\w+)\.weight$")
EMBEDDING = re.compile(r"embed|wte|wpe")

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

    @property
    def stock_at_full_width(self) -> str | None:
        """What its results are saved as at full width: its own type, unless a norm is behind the embeddings (BLOOM)."""
        return self.stock or (None if self.model_type == "bloom" else self.model_type)

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """The dense model, in evaluation mode."""
        return tiny_model(self.model_type, self.config | self.extra, dtype)

    @property
    def widest(self) -> torch.dtype:
        """The dtype of a reference (XGLM's attention overflows in float64)."""
        return torch.float32 if self.model_type == "xglm" else torch.float64

    @property
    def tied(self) -> bool:
        """Whether the embeddings can stay tied (BLOOM's norm between them and the stream parts them)."""
        config = AutoConfig.for_model(self.model_type, **copy.deepcopy(self.config | self.extra))
        tied = config.tie_word_embeddings
        return tied and self.model_type != "bloom"


CORE = {
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

"""Cases that all tests run over."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
HEAD = LLAMA | {"head_dim": 12, "rope_parameters": ROPE}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
GEMMA4 = {
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}

FAMILIES = {
    "arcee": Case("arcee", HEAD, "arcee"),
    "cwm": Case(
        "cwm", HEAD, "cwm", {"sliding_window": 6, "layer_types": ["full_attention", *["sliding_attention"] * 2]}
    ),
    "ministral": Case("ministral", HEAD, "ministral", {"sliding_window": 6}),
    "ministral3": Case("ministral3", HEAD, "ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}),
    "smollm3": Case("smollm3", HEAD, "smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "ernie4_5": Case("ernie4_5", HEAD, "ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    "seed_oss": Case("seed_oss", HEAD, "seed_oss", {"attention_out_bias": True}),
    "helium": Case("helium", LLAMA | {"head_dim": 8}),
    "hunyuan_v1_dense": Case("hunyuan_v1_dense", HEAD, "hunyuan_v1_dense", {"attention_bias": True}),
    "apertus": Case("apertus", HEAD, "apertus"),
    "glm": Case("glm", HEAD, "glm"),
    "phi3": Case("phi3", HEAD, "phi3"),
    "granite": Case("granite", HEAD, "granite", GRANITE),
    "granite-tied": Case("granite", HEAD, "granite", GRANITE | {"tie_word_embeddings": True}),
    "gemma": Case("gemma", HEAD, "gemma", {"tie_word_embeddings": True}),
    "gemma-untied": Case("gemma", HEAD, "gemma"),
    "starcoder2": Case("starcoder2", HEAD, "starcoder2", {"tie_word_embeddings": False}),
    "starcoder2-tied": Case("starcoder2", HEAD, None, {"tie_word_embeddings": True}),
    "nemotron": Case("nemotron", HEAD, "nemotron"),
    "cohere": Case("cohere", HEAD, "cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": Case("cohere2", HEAD, "cohere2", {"logit_scale": 0.3, "sliding_window": 6}),
    "cohere2-tied": Case("cohere2", HEAD, None, {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "olmo": Case("olmo", HEAD, "olmo"),
    "gpt2": Case("gpt2", COMMON, None, {"n_inner": 56, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt2-untied": Case("gpt2", COMMON, None, {"n_inner": 56, "tie_word_embeddings": False}),
    "gpt_bigcode": Case("gpt_bigcode", COMMON, None, {"n_inner": 56}),
    "gpt_bigcode-not-shared": Case(
        "gpt_bigcode", COMMON, None, {"n_inner": 56, "multi_query": False, "num_key_value_heads": 4}
    ),
    "gpt_neo": Case(
        "gpt_neo", COMMON, None, {"intermediate_size": 56, "attention_types": [[["global", "local", "global"], 1]]}
    ),
    "gptj": Case("gptj", COMMON, None, {"n_inner": 56, "rotary_dim": 4}),
    "codegen": Case("codegen", COMMON | {"num_attention_heads": 8}, None, {"n_inner": 56, "rotary_dim": 4}),
    "bloom": Case("bloom", COMMON),
    "mpt": Case("mpt", COMMON),
    "falcon": Case("falcon", COMMON),
    "falcon-new": Case("falcon", COMMON, None, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": Case(
        "falcon", COMMON, None, {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    ),
    "falcon-sequential": Case("falcon", COMMON, None, {"parallel_attn": False, "alibi": True, "bias": True}),
    "xglm": Case("xglm", COMMON, None, {"ffn_dim": 56, "dropout": 0.0, "attention_heads": 4, "num_layers": 3}),
    "stablelm": Case("stablelm", LLAMA, None, {"qk_layernorm": True}),
    "stablelm-parallel": Case("stablelm", LLAMA, None, {"use_parallel_residual": True, "use_qkv_bias": True}),
    "persimmon": Case("persimmon", LLAMA),
    "mixtral": Case("mixtral", HEAD, "mixtral", {"num_local_experts": 4}),
    "qwen2_moe": Case(
        "qwen2_moe", HEAD, "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}
    ),
    "qwen3_moe": Case("qwen3_moe", HEAD, "qwen3_moe", EXPERTS | {"tie_word_embeddings": True, "mlp_only_layers": [1]}),
    "glm4_moe": Case("glm4_moe", HEAD, "glm4_moe", EXPERTS | DEEPSEEK | {"use_qk_norm": True}),
    "deepseek_v2": Case("deepseek_v2", HEAD, "deepseek_v2", EXPERTS | DEEPSEEK | LATENT | {"topk_method": "greedy"}),
    "deepseek_v2-plain-queries": Case(
        "deepseek_v2", HEAD, "deepseek_v2", EXPERTS | DEEPSEEK | LATENT | {"topk_method": "greedy", "q_lora_rank": None}
    ),
    "deepseek_v3": Case("deepseek_v3", HEAD, "deepseek_v3", EXPERTS | DEEPSEEK | LATENT),
    "deepseek_v3-plain-queries": Case(
        "deepseek_v3", HEAD, "deepseek_v3", EXPERTS | DEEPSEEK | LATENT | {"q_lora_rank": None}
    ),
    "minimax_m2": Case("minimax_m2", HEAD, "minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": Case("granitemoe", HEAD, "granitemoe", GRANITE | {"num_local_experts": 4}),
    "gpt_oss": Case(
        "gpt_oss", HEAD, "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    ),
    "llama4_text": Case(
        "llama4_text",
        HEAD,
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
    ),
    "phimoe": Case("phimoe", HEAD, "phimoe", {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}),
    "phimoe-no-biases": Case("phimoe", HEAD, "phimoe", {"num_local_experts": 4}),
    "olmoe": Case("olmoe", LLAMA, None, EXPERTS),
    "gemma2": Case(
        "gemma2", HEAD, None, {"tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 12}
    ),
    "gemma3_text": Case("gemma3_text", HEAD | {"rope_parameters": None}, None, {"sliding_window": 6}),
    "gemma4_text": Case(
        "gemma4_text",
        HEAD | {"rope_parameters": None},
        None,
        GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 3.0},
    ),
    "gemma4_text-tied": Case(
        "gemma4_text", HEAD | {"rope_parameters": None}, None, GEMMA4 | {"tie_word_embeddings": True}
    ),
    "glm4": Case("glm4", HEAD),
    "olmo2": Case("olmo2", LLAMA, None, {"attention_bias": True}),
    "olmo3": Case("olmo3", LLAMA, None, {"sliding_window": 6}),
    "qwen3_next": Case(
        "qwen3_next",
        HEAD,
        "qwen3_next",
        EXPERTS | DELTA | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3_5_text": Case("qwen3_5_text", HEAD, "qwen3_5_text", DELTA | {"tie_word_embeddings": True}),
    "qwen3_5_moe_text": Case(
        "qwen3_5_moe_text", HEAD, "qwen3_5_moe_text", EXPERTS | DELTA | {"shared_expert_intermediate_size": 40}
    ),
    "exaone4": Case("exaone4", LLAMA, None, {"sliding_window": 6, "sliding_window_pattern": 2}),
}
"""One case or more for each further table: at full width and below, each form loads and computes the same."""

CASES = CORE | FAMILIES
MLPS = {case: TABLES[CASES[case].model_type].mlp for case in CASES}
POST_NORMS = [case for case in CASES if TABLES[CASES[case].model_type].has_post_norms]
"""Cases with norms between sublayers and the stream."""
WITH_NEURONS = [case for case, mlp in MLPS.items() if mlp.can_cut_neurons and not mlp.stacked]
"""Cases with neurons that can be cut, and without experts."""


def tiny_model(model_type: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, norm gains away from 1, and shifts and biases away from 0."""
    torch.manual_seed(0)
    # A copy: config classes add to the dictionaries that they are given
    return randomized(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **copy.deepcopy(config))), dtype
    )


def randomized(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Let a model have such weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if NORM.search(name):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif EMBEDDING.search(name):
                parameter.copy_(0.5 + noise)  # a mean that centring has to remove
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("layer_scalar"):
                buffer.copy_(0.2 + torch.rand(buffer.shape, generator=generator))
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
