"""StableLM: Llama with LayerNorms; with use_parallel_residual, attention and MLP read one norm."""

from dataclasses import replace

from eigenslice.arch.schema import Variant
from eigenslice.arch.tables import llama

TABLES = (
    replace(
        llama.TABLE,
        model_type="stablelm",
        norm="layer",
        eps="layer_norm_eps",
        attention=replace(llama.ATTENTION, inner=("self_attn.q_layernorm", "self_attn.k_layernorm")),
        variants=(
            Variant(
                when=lambda c: c.use_parallel_residual,
                changes={"parallel": True, "mlp": replace(llama.MLP, norm="input_layernorm")},
            ),
        ),
        dropout="hidden_dropout",
        stock=(),
    ),
)
