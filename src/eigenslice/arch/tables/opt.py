"""OPT: LayerNorm, learned positions, fc1 and fc2 in the decoder layer; attention as wide as the stream."""

from eigenslice.arch.heads import separate
from eigenslice.arch.schema import Refusal, Sublayer, Table

TABLE = Table(
    model_type="opt",
    norm="layer",
    eps=1e-5,  # torch.nn.LayerNorm's default: OPT's config doesn't say
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    lm_head="lm_head",
    attention=Sublayer(
        norm="self_attn_layer_norm",
        modules=("self_attn",),
        readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        writers=("self_attn.out_proj",),
        heads=separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    ),
    mlp=Sublayer(
        norm="final_layer_norm",
        modules=("fc1", "activation_fn", "fc2"),
        readers=("fc1",),
        writers=("fc2",),
        can_cut_neurons=True,
    ),
    neurons_field="ffn_dim",
    kv_heads_field=None,
    heads_span_width=True,
    width_fields=("word_embed_proj_dim",),
    dropout="dropout",
    refusals=(
        Refusal(
            when=lambda c: not c.do_layer_norm_before,
            reason="do_layer_norm_before=false puts the norms after the sublayers (OPT-350m), and such a norm "
            "doesn't commute with a rotation",
        ),
        Refusal(
            when=lambda c: c.word_embed_proj_dim != c.hidden_size,
            reason="word_embed_proj_dim differs from hidden_size, so embeddings and blocks are joined by "
            "projections (OPT-350m)",
        ),
        Refusal(
            when=lambda c: c._remove_final_layer_norm,
            reason="_remove_final_layer_norm=true leaves no norm before the head",
        ),
    ),
)
TABLES = (TABLE,)
