"""GPT-J and CodeGen: LayerNorm, attention and MLP in parallel behind one norm, rotary angles, a head with a bias."""

from dataclasses import replace

from eigenslice.arch.schema import Sublayer, Table

TABLE = Table(
    model_type="gptj",
    norm="layer",
    eps="layer_norm_epsilon",
    embeddings=("transformer.wte",),
    layers="transformer.h",
    layers_give_tuples=True,
    reshapes_output=True,
    final_norm="transformer.ln_f",
    lm_head="lm_head",
    attention=Sublayer(
        norm="ln_1",
        modules=("attn",),
        readers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        writers=("attn.out_proj",),
    ),
    mlp=Sublayer(
        norm="ln_1",
        modules=("mlp",),
        readers=("mlp.fc_in",),
        writers=("mlp.fc_out",),
        can_cut_neurons=True,
    ),
    parallel=True,
    neurons_field="n_inner",
)
TABLES = (
    TABLE,
    replace(TABLE, model_type="codegen", attention=replace(TABLE.attention, readers=("attn.qkv_proj",))),
)
