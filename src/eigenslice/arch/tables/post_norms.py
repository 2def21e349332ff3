"""Norms after the sublayers: Gemma 2, 3 and 4, GLM-4 (before and after), OLMo 2 and 3, EXAONE 4 (after only)."""

from dataclasses import replace

from eigenslice.arch.heads import JOINED
from eigenslice.arch.schema import Refusal, Sublayer, Table, Variant
from eigenslice.arch.tables import gemma, glm, llama

QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def followed(sublayer: Sublayer, norm: str | None, post_norm: str, inner: tuple[str, ...] = ()) -> Sublayer:
    """Return a sublayer with a norm between its output and the stream."""
    return replace(
        sublayer,
        norm=norm,
        post_norm=post_norm,
        modules=(*sublayer.modules, post_norm),
        writers=(),
        normed_writers=sublayer.writers,
        inner=inner,
    )


def sandwich(table: Table, model_type: str, inner: tuple[str, ...] = ()) -> Table:
    """Gemma's names for norms before and after."""
    return replace(
        table,
        model_type=model_type,
        attention=followed(table.attention, "input_layernorm", "post_attention_layernorm", inner),
        mlp=followed(table.mlp, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        stock=(),
    )


def after(model_type: str, base: Sublayer = llama.ATTENTION) -> Table:
    """OLMo's names for norms after the sublayers, which read the stream as it is."""
    return replace(
        llama.TABLE,
        model_type=model_type,
        attention=followed(base, None, "post_attention_layernorm", QK_NORMS),
        mlp=followed(llama.MLP, None, "post_feedforward_layernorm"),
        stock=(),
    )


NORMS_OVER_HEADS = replace(llama.ATTENTION, heads={}, why_no_heads=JOINED)
GEMMA4 = sandwich(gemma.TABLE, "gemma4_text", QK_NORMS)
GEMMA4_ATTENTION = replace(GEMMA4.attention, renames={"self_attn": {"per_layer_input": None}})
TWO_NUMBERS = "full layers have other key/value heads than sliding ones"
GEMMA4_REFUSALS = (
    Refusal(
        when=lambda c: bool(c.hidden_size_per_layer_input),
        reason="it adds an embedding of the token to the stream in every layer, behind a norm of its own "
        "(hidden_size_per_layer_input, as E2B and E4B have it)",
    ),
    Refusal(
        when=lambda c: bool(c.enable_moe_block),
        reason="experts and MLP read two norms of one stream, and one norm is behind both (enable_moe_block)",
    ),
    Refusal(
        when=lambda c: bool(c.num_kv_shared_layers),
        reason="layers take keys and values from earlier ones (num_kv_shared_layers)",
    ),
    Refusal(
        when=lambda c: c.use_bidirectional_attention == "all",
        reason="tokens see those behind them (use_bidirectional_attention)",
    ),
)

TABLES = (
    sandwich(gemma.TABLE, "gemma2"),
    sandwich(gemma.TABLE, "gemma3_text", QK_NORMS),
    replace(
        GEMMA4,
        gain="w",
        attention=GEMMA4_ATTENTION,
        mlp=replace(GEMMA4.mlp, inner=(*GEMMA4.mlp.inner, "layer_scalar")),
        stream_scale="layer_scalar",
        variants=(
            Variant(
                when=lambda c: c.attention_k_eq_v,
                changes={"attention": replace(GEMMA4_ATTENTION, heads={}, why_no_heads=TWO_NUMBERS)},
            ),
        ),
        refusals=GEMMA4_REFUSALS,
    ),
    replace(
        llama.TABLE,
        model_type="glm4",
        attention=followed(llama.ATTENTION, "input_layernorm", "post_self_attn_layernorm"),
        mlp=followed(glm.MLP, "post_attention_layernorm", "post_mlp_layernorm"),
        stock=(),
    ),
    after("olmo2", NORMS_OVER_HEADS),
    after("olmo3", NORMS_OVER_HEADS),
    after("exaone4"),
)
