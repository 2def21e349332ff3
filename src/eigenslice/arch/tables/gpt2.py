"""GPT-2: LayerNorm, learned positions, q, k, v in one, weights held as in x out; GPT-BigCode with plain weights."""

from dataclasses import replace

from eigenslice.arch.schema import Refusal, Sublayer, Table

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
    ),
    mlp=Sublayer(
        norm="ln_2",
        modules=("mlp",),
        readers=("mlp.c_fc",),
        writers=("mlp.c_proj",),
        can_cut_neurons=True,
    ),
    neurons_field="n_inner",
    refusals=(Refusal(when=lambda c: c.add_cross_attention, reason="add_cross_attention=true adds a third sublayer"),),
)
TABLE = replace(
    BIGCODE,
    model_type="gpt2",
    attention=replace(BIGCODE.attention, transposed=("attn.c_attn", "attn.c_proj")),
    mlp=replace(BIGCODE.mlp, transposed=("mlp.c_fc", "mlp.c_proj")),
    numbered="scale_attn_by_inverse_layer_idx",
)
TABLES = (TABLE, BIGCODE)
