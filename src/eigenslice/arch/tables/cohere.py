"""Command R and Aya (cohere, cohere2): LayerNorm without a shift, attention and MLP in parallel, a factor on logits."""

from dataclasses import replace

from eigenslice.arch.heads import KEYS, QUERIES
from eigenslice.arch.schema import NOT_LLAMA_CPP, StockForm
from eigenslice.arch.tables import llama

TABLE = replace(
    llama.TABLE,
    model_type="cohere",
    norm="layer",
    eps="layer_norm_eps",
    attention=replace(
        llama.ATTENTION,
        inner=("self_attn.q_norm", "self_attn.k_norm"),
        heads={**llama.ATTENTION.heads, "self_attn.q_norm": QUERIES, "self_attn.k_norm": KEYS},
    ),
    mlp=replace(llama.MLP, norm="input_layernorm"),
    parallel=True,
    logit_scale=lambda c: c.logit_scale,
    stock=(StockForm(model_type="cohere", warning=NOT_LLAMA_CPP),),
)
TABLES = (
    TABLE,
    replace(
        TABLE,
        model_type="cohere2",
        attention=llama.ATTENTION,
        stock=(StockForm(model_type="cohere2", warning=NOT_LLAMA_CPP),),
    ),
)
