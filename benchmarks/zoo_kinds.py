"""The kinds of models that zoo.py trains: configs of a million parameters, in the proportions of their families."""

from typing import Any

BLOCKS, WIDTH, HEADS = 6, 128, 4
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
}
SHARED_HEADS = COMMON | {"num_key_value_heads": 2}
GATED = SHARED_HEADS | {"intermediate_size": 384}
PLAIN = {"intermediate_size": 512}
"""MLPs of two matrices are four times as wide as the stream, gated ones three times."""
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = {"sliding_window": 64}

EXPERTS = SHARED_HEADS | {
    "num_hidden_layers": 5,
    "intermediate_size": 384,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.02,
}
"""Mixtures have one block less; the coefficient is Mixtral's, ten times most defaults: trainings are short."""
SIXTEEN = {"num_experts": 16, "moe_intermediate_size": 48, "norm_topk_prob": True, "head_dim": WIDTH // HEADS}

KINDS: dict[str, dict[str, Any]] = {
    "llama": GATED | {"model_type": "llama", "tie_word_embeddings": True},
    "gemma3_text": GATED
    | WINDOW
    | {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "head_dim": WIDTH // HEADS,
        "query_pre_attn_scalar": WIDTH // HEADS,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
    },
    "qwen3_moe": EXPERTS | SIXTEEN | {"model_type": "qwen3_moe"},
    "olmo2": GATED | {"model_type": "olmo2"},
    "gpt2": COMMON | {"model_type": "gpt2", "n_inner": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "deepseek_v3": EXPERTS
    | {
        "model_type": "deepseek_v3",
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 48,
        "num_key_value_heads": HEADS,
        "q_lora_rank": 64,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
        "router_aux_loss_coef": 0.0,
    },
    "gpt_oss": EXPERTS
    | WINDOW
    | {
        "model_type": "gpt_oss",
        "num_local_experts": 16,
        "intermediate_size": 48,
        "head_dim": WIDTH // HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "phi": COMMON | PLAIN | {"model_type": "phi"},
    "granite": GATED
    | {
        "model_type": "granite",
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 1 / (WIDTH // HEADS),
    },
    "falcon": COMMON
    | {"model_type": "falcon", "ffn_hidden_size": 512, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mixtral": EXPERTS
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_next": EXPERTS
    | SIXTEEN
    | {
        "model_type": "qwen3_next",
        "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "linear_attention", FULL, "linear_attention", FULL],
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
"""Kind to the fields of its config that differ from transformers' defaults, in the order of training."""
