"""Mistral: Llama without biases, with or without a sliding window."""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import llama

TABLE = replace(llama.TABLE, model_type="mistral", stock=(StockForm(model_type="mistral", portable=True),))
TABLES = (TABLE,)
