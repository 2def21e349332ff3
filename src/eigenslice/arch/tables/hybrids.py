"""Qwen3-Next and Qwen3.5: most layers have a gated delta net (a recurrence) in the attention's place.

The delta net reads and writes the stream by linear layers, as attention does.
"""

from dataclasses import replace

from eigenslice.arch.schema import StockForm, Sublayer
from eigenslice.arch.tables import gemma, llama, mixtures

NET = "linear_attn"


def either(readers: tuple[str, ...]) -> Sublayer:
    """Attention, or a delta net with these readers."""
    return replace(
        llama.ATTENTION,
        modules=("self_attn", NET),
        readers=(*llama.ATTENTION.readers, *(f"{NET}.{name}" for name in readers)),
        writers=(*llama.ATTENTION.writers, f"{NET}.out_proj"),
        inner=(*mixtures.QK_NORMS, *(f"{NET}.{name}" for name in ("conv1d", "norm", "A_log", "dt_bias"))),
        renames={NET: {"past_key_values": "cache_params", "position_embeddings": None, "position_ids": None}},
    )


QWEN35 = replace(
    gemma.TABLE,
    model_type="qwen3_5_text",
    width_scales_embedding=False,
    attention=either(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
    stock=(StockForm(model_type="qwen3_5_text"),),
)
TABLES = (
    replace(
        gemma.TABLE,
        model_type="qwen3_next",
        width_scales_embedding=False,
        attention=either(("in_proj_qkvz", "in_proj_ba")),
        mlp=mixtures.mixture(dense=True, shared="shared_expert", more=["shared_expert_gate"]),
        neurons_field=mixtures.EXPERTS_FIELD,
        experts_field=mixtures.NUMBER,
        stock=(StockForm(model_type="qwen3_next"),),
    ),
    QWEN35,
    replace(
        QWEN35,
        model_type="qwen3_5_moe_text",
        mlp=mixtures.mixture(shared="shared_expert", more=["shared_expert_gate"]),
        neurons_field=mixtures.EXPERTS_FIELD,
        experts_field=mixtures.NUMBER,
        stock=(StockForm(model_type="qwen3_5_moe_text"),),
    ),
)
