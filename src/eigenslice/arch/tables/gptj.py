"""GPT-J and CodeGen: LayerNorm, attention and MLP in parallel behind one norm, rotary angles, a head with a bias."""

from dataclasses import replace

from eigenslice.arch.heads import HeadRows, fused, separate
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
        heads=separate("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
    ),
    mlp=Sublayer(
        norm="ln_1",
        modules=("mlp",),
        readers=("mlp.fc_in",),
        writers=("mlp.fc_out",),
        can_cut_neurons=True,
    ),
    neurons_field="n_inner",
    kv_heads_field=None,
    heads_span_width=True,
    parallel=True,
)
CORES = 4
"""Parts in which CodeGen's code holds queries, values and keys: heads come in multiples of it."""
CODEGEN = replace(
    TABLE.attention,
    readers=("attn.qkv_proj",),
    heads=fused("attn.qkv_proj", HeadRows("qvk", blocks=CORES), "attn.out_proj"),
)
TABLES = (
    TABLE,
    replace(TABLE, model_type="codegen", attention=CODEGEN, heads_step=CORES),
)
