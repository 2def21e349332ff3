"""OLMo: Llama with LayerNorms without gain or shift."""

from dataclasses import replace

from eigenslice.arch.schema import NOT_LLAMA_CPP, StockForm
from eigenslice.arch.tables import llama

TABLES = (
    replace(
        llama.TABLE,
        model_type="olmo",
        norm="layer",
        eps=1e-5,  # transformers' code says so, not the config
        stock=(StockForm(model_type="olmo", warning=NOT_LLAMA_CPP),),
    ),
)
