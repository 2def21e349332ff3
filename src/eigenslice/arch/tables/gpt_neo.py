"""GPT-Neo: LayerNorm, learned positions, attention within a window in every other layer."""

from dataclasses import replace

from eigenslice.arch.heads import separate
from eigenslice.arch.schema import Sublayer
from eigenslice.arch.tables import gpt2

TABLES = (
    replace(
        gpt2.BIGCODE,
        model_type="gpt_neo",
        layers_give_tuples=True,
        attention=Sublayer(
            norm="ln_1",
            modules=("attn",),
            readers=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            writers=("attn.attention.out_proj",),
            heads=separate(
                "attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.out_proj"
            ),
        ),
        neurons_field="intermediate_size",
        refusals=(),
    ),
)
