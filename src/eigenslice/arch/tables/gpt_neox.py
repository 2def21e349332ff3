"""GPT-NeoX and Pythia: LayerNorm, fused q/k/v, parallel or sequential; attention as wide as the stream."""

from eigenslice.arch.heads import BY_HEAD, fused
from eigenslice.arch.schema import Sublayer, Table

TABLE = Table(
    model_type="gpt_neox",
    norm="layer",
    eps="layer_norm_eps",
    embeddings=("gpt_neox.embed_in",),
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    lm_head="lm_head",
    attention=Sublayer(
        norm="input_layernorm",
        modules=("attention",),
        readers=("attention.query_key_value",),
        writers=("attention.dense",),
        heads=fused("attention.query_key_value", BY_HEAD, "attention.dense"),
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
    parallel="use_parallel_residual",
    dropout="hidden_dropout",
)
TABLES = (TABLE,)
