"""XGLM: OPT with sinusoids for positions, which are rotated and stored."""

from dataclasses import replace

from eigenslice.arch.schema import Refusal
from eigenslice.arch.tables import opt

TABLES = (
    replace(
        opt.TABLE,
        model_type="xglm",
        embeddings=("model.embed_tokens",),
        sinusoids="model.embed_positions",
        layers="model.layers",
        final_norm="model.layer_norm",
        width_fields=(),
        refusals=(
            Refusal(when=lambda c: c.add_cross_attention, reason="add_cross_attention=true adds a third sublayer"),
        ),
    ),
)
