"""GLM: Llama with gate and up projection in one."""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables import llama

MLP = replace(llama.MLP, readers=("mlp.gate_up_proj",), gated=("mlp.gate_up_proj",))
TABLES = (replace(llama.TABLE, model_type="glm", mlp=MLP, stock=(StockForm(model_type="glm"),)),)
