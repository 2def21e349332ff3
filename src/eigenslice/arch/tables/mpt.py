"""MPT: LayerNorm without a shift, ALiBi, q, k, v in one; the MLP adds the stream itself."""

from eigenslice.arch.heads import ALIBI
from eigenslice.arch.schema import Sublayer, Table

TABLES = (
    Table(
        model_type="mpt",
        norm="layer",
        eps="layer_norm_epsilon",
        embeddings=("transformer.wte",),
        layers="transformer.blocks",
        layers_give_tuples=True,
        neurons_field=None,
        final_norm="transformer.norm_f",
        lm_head="lm_head",
        attention=Sublayer(
            norm="norm_1",
            modules=("attn",),
            readers=("attn.Wqkv",),
            writers=("attn.out_proj",),
            why_no_heads=ALIBI,
            renames={"attn": {"layer_past": "past_key_values"}},
        ),
        mlp=Sublayer(
            norm="norm_2",
            modules=("ffn",),
            readers=("ffn.up_proj",),
            writers=("ffn.down_proj",),
            can_cut_neurons=True,
            adds_stream=True,
        ),
    ),
)
