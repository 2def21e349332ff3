"""StarCoder2: LayerNorm, biases, an MLP without a gate."""

from eigenslice.arch.heads import separate
from eigenslice.arch.schema import NOT_LLAMA_CPP, StockForm, Sublayer, Table

ATTENTION = Sublayer(
    norm="input_layernorm",
    modules=("self_attn",),
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writers=("self_attn.o_proj",),
    heads=separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)

TABLE = Table(
    model_type="starcoder2",
    norm="layer",
    eps="norm_epsilon",
    embeddings=("model.embed_tokens",),
    layers="model.layers",
    final_norm="model.norm",
    lm_head="lm_head",
    attention=ATTENTION,
    mlp=Sublayer(
        norm="post_attention_layernorm",
        modules=("mlp",),
        readers=("mlp.c_fc",),
        writers=("mlp.c_proj",),
        can_cut_neurons=True,
    ),
    stock=(StockForm(model_type="starcoder2", warning=NOT_LLAMA_CPP),),
)
TABLES = (TABLE,)
