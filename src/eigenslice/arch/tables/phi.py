"""Phi-1, Phi-1.5, Phi-2: LayerNorm, attention and MLP in parallel behind one norm, a head with a bias."""

from eigenslice.arch.heads import separate
from eigenslice.arch.schema import NOT_LLAMA_CPP, StockForm, Sublayer, Table, Variant

TABLE = Table(
    model_type="phi",
    norm="layer",
    eps="layer_norm_eps",
    embeddings=("model.embed_tokens",),
    layers="model.layers",
    final_norm="model.final_layernorm",
    lm_head="lm_head",
    attention=Sublayer(
        norm="input_layernorm",
        modules=("self_attn",),
        readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        writers=("self_attn.dense",),
        heads=separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        inner=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    ),
    mlp=Sublayer(
        norm="input_layernorm",
        modules=("mlp",),
        readers=("mlp.fc1",),
        writers=("mlp.fc2",),
        can_cut_neurons=True,
    ),
    parallel=True,
    dropout="resid_pdrop",
    # transformers sizes the query and key norms by hidden_size / heads, which is no longer head_dim after slicing
    variants=(Variant(when=lambda c: c.qk_layernorm, changes={"heads_span_width": True}),),
    stock=(StockForm(model_type="phi", warning=NOT_LLAMA_CPP, applies=lambda c: not c.qk_layernorm),),
)
TABLES = (TABLE,)
