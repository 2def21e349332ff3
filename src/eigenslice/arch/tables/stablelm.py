"""StableLM: Llama with LayerNorms; with use_parallel_residual, attention and MLP read one norm."""

from dataclasses import replace

from eigenslice.arch.heads import HeadRows
from eigenslice.arch.schema import Variant
from eigenslice.arch.tables import llama

NORMS = {
    "self_attn.q_layernorm.norms": HeadRows("q", modules=True),
    "self_attn.k_layernorm.norms": HeadRows("k", modules=True),
}
"""A norm for each head's queries and keys."""

TABLES = (
    replace(
        llama.TABLE,
        model_type="stablelm",
        norm="layer",
        eps="layer_norm_eps",
        attention=replace(
            llama.ATTENTION,
            inner=tuple(NORMS),
            heads={**llama.ATTENTION.heads, **NORMS},
        ),
        heads_span_width=True,
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
