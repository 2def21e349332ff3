"""Falcon: LayerNorm, q, k, v in one. Blocks are parallel behind one norm (7B), behind two (40B), or sequential (RW)."""

from dataclasses import replace
from typing import Any

from eigenslice.arch.heads import ALIBI, BY_HEAD, fused
from eigenslice.arch.schema import Refusal, Sublayer, Table, Variant

ATTENTION = Sublayer(
    norm="input_layernorm",
    modules=("self_attention",),
    readers=("self_attention.query_key_value",),
    writers=("self_attention.dense",),
    heads=fused("self_attention.query_key_value", BY_HEAD, "self_attention.dense"),
)
WITH_ALIBI = replace(ATTENTION, heads={}, why_no_heads=ALIBI)
MLP = Sublayer(
    norm="input_layernorm",
    modules=("mlp",),
    readers=("mlp.dense_h_to_4h",),
    writers=("mlp.dense_4h_to_h",),
    can_cut_neurons=True,
)


def number_of_kv_heads(config: Any) -> int:
    """Return the number of key/value heads; with multi_query, there is one outside of the new architecture."""
    shared = config.multi_query and not config.new_decoder_architecture
    return 1 if shared else int(config.num_kv_heads)


TABLES = (
    Table(
        model_type="falcon",
        norm="layer",
        eps="layer_norm_epsilon",
        embeddings=("transformer.word_embeddings",),
        layers="transformer.h",
        layers_give_tuples=True,
        final_norm="transformer.ln_f",
        lm_head="lm_head",
        attention=ATTENTION,
        mlp=MLP,
        kv_heads=number_of_kv_heads,
        kv_heads_field="num_kv_heads",
        heads_span_width=True,
        neurons_field="ffn_hidden_size",
        parallel=True,
        dropout="hidden_dropout",
        variants=(
            Variant(
                when=lambda c: c.new_decoder_architecture and c.num_ln_in_parallel_attn in (None, 2),
                changes={"attention": replace(ATTENTION, norm="ln_attn"), "mlp": replace(MLP, norm="ln_mlp")},
            ),
            Variant(
                when=lambda c: not c.new_decoder_architecture and not c.parallel_attn,
                changes={"parallel": False, "mlp": replace(MLP, norm="post_attention_layernorm")},
            ),
            Variant(when=lambda c: c.alibi, changes={"attention": WITH_ALIBI}),
        ),
        refusals=(
            Refusal(
                when=lambda c: c.new_decoder_architecture and not c.parallel_attn,
                reason="new_decoder_architecture=true with parallel_attn=false is no Falcon that transformers runs",
            ),
        ),
    ),
)
