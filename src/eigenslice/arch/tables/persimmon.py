"""Persimmon: LayerNorm, q, k, v in one, a norm on each head's query and key."""

from eigenslice.arch.heads import BY_HEAD, fused
from eigenslice.arch.schema import Sublayer, Table

TABLES = (
    Table(
        model_type="persimmon",
        norm="layer",
        eps="layer_norm_eps",
        embeddings=("model.embed_tokens",),
        layers="model.layers",
        final_norm="model.final_layernorm",
        lm_head="lm_head",
        attention=Sublayer(
            norm="input_layernorm",
            modules=("self_attn",),
            readers=("self_attn.query_key_value",),
            writers=("self_attn.dense",),
            heads=fused("self_attn.query_key_value", BY_HEAD, "self_attn.dense"),
            inner=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        ),
        mlp=Sublayer(
            norm="post_attention_layernorm",
            modules=("mlp",),
            readers=("mlp.dense_h_to_4h",),
            writers=("mlp.dense_4h_to_h",),
            can_cut_neurons=True,
        ),
        kv_heads_field=None,
        heads_span_width=True,
        dropout="hidden_dropout",
    ),
)
