"""Qwen3: Llama with an RMSNorm on each head's query and key, and an explicit head_dim."""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import llama

TABLE = replace(
    llama.TABLE,
    model_type="qwen3",
    attention=replace(llama.ATTENTION, inner=("self_attn.q_norm", "self_attn.k_norm")),
    stock=(StockForm(model_type="qwen3", portable=True),),
)
TABLES = (TABLE,)
