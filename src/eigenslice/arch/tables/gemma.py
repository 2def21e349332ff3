"""Gemma: Llama with norms of gain 1 + w and embeddings multiplied by sqrt(hidden_size)."""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import llama

TABLE = replace(
    llama.TABLE,
    model_type="gemma",
    gain="1+w",
    width_scales_embedding=True,
    stock=(StockForm(model_type="gemma", portable=True),),
)
TABLES = (TABLE,)
