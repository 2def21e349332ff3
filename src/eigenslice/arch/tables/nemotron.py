"""Nemotron: LayerNorm of gain 1 + w, an MLP without a gate."""

from dataclasses import replace

from eigenslice.arch.schema import NOT_LLAMA_CPP, StockForm
from eigenslice.arch.tables import llama_like, starcoder2

TABLES = (
    replace(
        starcoder2.TABLE,
        model_type="nemotron",
        eps="norm_eps",
        gain="1+w",
        mlp=llama_like.UP_DOWN,
        stock=(StockForm(model_type="nemotron", warning=NOT_LLAMA_CPP),),
    ),
)
