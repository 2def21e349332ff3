"""Llama: RMSNorm, gated MLP. At widths that don't divide by the number of heads it is saved as Mistral."""

from eigenslice.arch.heads import separate
from eigenslice.arch.schema import StockForm, Sublayer, Table

ATTENTION = Sublayer(
    norm="input_layernorm",
    modules=("self_attn",),
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writers=("self_attn.o_proj",),
    heads=separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)
MLP = Sublayer(
    norm="post_attention_layernorm",
    modules=("mlp",),
    readers=("mlp.gate_proj", "mlp.up_proj"),
    writers=("mlp.down_proj",),
    can_cut_neurons=True,
)
LLAMA = StockForm(model_type="llama", applies=lambda c: not getattr(c, "sliding_window", None), portable=True)
MISTRAL = StockForm(
    model_type="mistral",
    applies=lambda c: not (getattr(c, "attention_bias", False) or getattr(c, "mlp_bias", False)),
    overrides={"sliding_window": None},
    portable=True,
)

TABLE = Table(
    model_type="llama",
    norm="rms",
    eps="rms_norm_eps",
    embeddings=("model.embed_tokens",),
    layers="model.layers",
    final_norm="model.norm",
    lm_head="lm_head",
    attention=ATTENTION,
    mlp=MLP,
    stock=(LLAMA, MISTRAL),
)
TABLES = (TABLE,)
