"""Phi-3 and Phi-4: Llama with q, k, v in one, and gate and up projection, too."""

from dataclasses import replace

from eigenslice.arch.heads import QUERIES_KEYS_VALUES, fused
from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import glm, llama

TABLES = (
    replace(
        llama.TABLE,
        model_type="phi3",
        attention=replace(
            llama.ATTENTION,
            readers=("self_attn.qkv_proj",),
            heads=fused("self_attn.qkv_proj", QUERIES_KEYS_VALUES, "self_attn.o_proj"),
        ),
        mlp=glm.MLP,
        dropout="resid_pdrop",
        stock=(StockForm(model_type="phi3"),),
    ),
)
