"""GPT-2: LayerNorm, learned positions, q, k, v in one, weights held as in x out; GPT-BigCode with plain weights."""

from dataclasses import replace

from eigenslice.arch.heads import BY_HEAD, QUERIES_KEYS_VALUES, fused
from eigenslice.arch.schema import Refusal, Sublayer, Table, Variant

BIGCODE = Table(
    model_type="gpt_bigcode",
    norm="layer",
    eps="layer_norm_epsilon",
    embeddings=("transformer.wte", "transformer.wpe"),
    layers="transformer.h",
    reshapes_output=True,
    final_norm="transformer.ln_f",
    lm_head="lm_head",
    attention=Sublayer(
        norm="ln_1",
        modules=("attn",),
        readers=("attn.c_attn",),
        writers=("attn.c_proj",),
        heads=fused("attn.c_attn", QUERIES_KEYS_VALUES, "attn.c_proj"),
    ),
    mlp=Sublayer(
        norm="ln_2",
        modules=("mlp",),
        readers=("mlp.c_fc",),
        writers=("mlp.c_proj",),
        can_cut_neurons=True,
    ),
    neurons_field="n_inner",
    kv_heads_field=None,
    heads_span_width=True,
    refusals=(Refusal(when=lambda c: c.add_cross_attention, reason="add_cross_attention=true adds a third sublayer"),),
)
TABLE = replace(
    BIGCODE,
    model_type="gpt2",
    attention=replace(BIGCODE.attention, transposed=("attn.c_attn", "attn.c_proj")),
    mlp=replace(BIGCODE.mlp, transposed=("mlp.c_fc", "mlp.c_proj")),
    numbered="scale_attn_by_inverse_layer_idx",
)
NOT_SHARED = Variant(
    when=lambda c: not c.multi_query,
    changes={"attention": replace(BIGCODE.attention, heads=fused("attn.c_attn", BY_HEAD, "attn.c_proj"))},
)
"""GPT-BigCode with a key and a value for each query head."""
TABLES = (TABLE, replace(BIGCODE, kv_heads_field="num_key_value_heads", variants=(NOT_SHARED,)))
