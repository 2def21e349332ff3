"""Qwen2: Llama with q/k/v biases.

At widths other than heads x head_dim, llama.cpp refuses Qwen2 and vLLM computes it wrongly. So the result is saved as
Llama with attention bias and a zero bias on o_proj, wherever Llama's config accepts the width.
"""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import llama

AS_LLAMA = StockForm(
    model_type="llama",
    applies=lambda c: all(kind == "full_attention" for kind in c.layer_types),
    overrides={"attention_bias": True},
    zero_biases=("self_attn.o_proj",),
    portable=True,
)

WARNING = "llama.cpp refuses Qwen2 at this width and vLLM computes it wrongly; a width that divides by the number of "
WARNING += "heads is saved as Llama, which both run"

TABLE = replace(llama.TABLE, model_type="qwen2", stock=(AS_LLAMA, StockForm(model_type="qwen2", warning=WARNING)))
TABLES = (TABLE,)
