"""Granite: Llama with multipliers on embeddings, attention, the sublayers' outputs, and logits."""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import llama

TABLE = replace(
    llama.TABLE,
    model_type="granite",
    residual_scale="residual_multiplier",
    logit_scale=lambda c: 1 / c.logits_scaling,
    stock=(StockForm(model_type="granite", overrides={"residual_multiplier": 1.0}),),
)
TABLES = (TABLE,)
