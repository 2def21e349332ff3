"""BLOOM: LayerNorm, ALiBi, a norm behind the embeddings; modules add the stream themselves."""

from eigenslice.arch.heads import ALIBI
from eigenslice.arch.schema import Refusal, Sublayer, Table

TABLES = (
    Table(
        model_type="bloom",
        norm="layer",
        eps="layer_norm_epsilon",
        embeddings=("transformer.word_embeddings",),
        embedding_norm="transformer.word_embeddings_layernorm",
        layers="transformer.h",
        layers_give_tuples=True,
        final_norm="transformer.ln_f",
        lm_head="lm_head",
        attention=Sublayer(
            norm="input_layernorm",
            modules=("self_attention",),
            readers=("self_attention.query_key_value",),
            writers=("self_attention.dense",),
            why_no_heads=ALIBI,
            adds_stream=True,
        ),
        mlp=Sublayer(
            norm="post_attention_layernorm",
            modules=("mlp",),
            readers=("mlp.dense_h_to_4h",),
            writers=("mlp.dense_4h_to_h",),
            can_cut_neurons=True,
            adds_stream=True,
        ),
        neurons_field=None,
        refusals=(
            Refusal(
                when=lambda c: c.apply_residual_connection_post_layernorm,
                reason="apply_residual_connection_post_layernorm=true puts the norm into the skip connection",
            ),
            Refusal(
                when=lambda c: c.pretraining_tp > 1 and c.slow_but_exact,
                reason="slow_but_exact=true adds up parts of the hidden width",
            ),
        ),
    ),
)
