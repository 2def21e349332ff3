"""llama.cpp's architectures for transformers' model types, as data.

The facts are from llama.cpp's loaders (src/models): the tensors that an architecture reads, its factors, and its
activation. The tests run each row in llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from eigenslice.arch.schema import Refusal

SCALED = ("default", "linear")
"""Rotary angles that are a number in the header."""
DIVIDED = (*SCALED, "llama3")
"""Rotary angles for which an architecture reads a factor for each frequency, too."""
INPUTS = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
"""Activations that llama.cpp computes as GELU."""


@dataclass(frozen=True)
class Architecture:
    """The form of a model_type in llama.cpp.

    Attributes:
        arch: Name of the architecture.
        interleaved: True if the two numbers of a rotary pair lie side by side in queries and keys. In transformers they
            lie half a head apart.
        any_width: True if it runs hidden widths other than heads x head_dim.
        counted: True if heads and neurons are given for each block.
        custom: True if it holds results of eigenslice's class, too.
        rope_types: Types of rotary angles that it computes.
        partly_rotary: True if the type rotates a part of each head and the architecture can do so.
        biases: Linear layers of a block with a bias that it reads, if there is one.
        activation: Field of the config with the MLP's activation.
        activations: transformers' names of its MLP activations.
        epsilon: Field of the config with the norms' epsilon.
        layer_norm: True if its norms are LayerNorms.
        gain_offset: Number that is added to the norms' weight to make their gain.
        windows: True if sliding windows alternate with full attention there, with rotary angles of their own.
        fused: Linear layers that transformers stores in one, with the names of their parts in the order of rows.
        keys: Further numbers in the header: the writer's method, and the field of the config.
        refusals: Variants of the type that the architecture has no place for.
    """

    arch: MODEL_ARCH
    interleaved: bool
    any_width: bool = True
    counted: bool = False
    custom: bool = False
    rope_types: tuple[str, ...] = SCALED
    partly_rotary: bool = False
    biases: tuple[str, ...] = INPUTS
    activation: str = "hidden_act"
    activations: tuple[str, ...] = ("silu",)
    epsilon: str = "rms_norm_eps"
    layer_norm: bool = False
    gain_offset: float = 0.0
    windows: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()

    @property
    def name(self) -> str:
        """llama.cpp's name for it."""
        return MODEL_ARCH_NAMES[self.arch]


LLAMA = Architecture(
    MODEL_ARCH.LLAMA, interleaved=True, rope_types=DIVIDED, biases=(*INPUTS, "o_proj", *GATED, "down_proj")
)
OWN = replace(LLAMA, custom=True)
"""Llama with results of eigenslice's class."""

EXPERTS = {
    "add_expert_count": "num_experts",
    "add_expert_used_count": "num_experts_per_tok",
    "add_expert_feed_forward_length": "moe_intermediate_size",
}
DENSE_BLOCKS = Refusal(
    when=lambda c: bool(c.mlp_only_layers) or c.decoder_sparse_step != 1, reason="blocks without experts"
)


def gemma3_scale(config: Any) -> float:
    """Number whose root llama.cpp divides Gemma 3's scores by; it knows the 27B model by its number of blocks."""
    return config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim


ARCHITECTURES = {
    "llama": OWN,
    "mistral": OWN,
    "qwen2": Architecture(MODEL_ARCH.QWEN2, interleaved=False, any_width=False, custom=True),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, interleaved=False, custom=True),
    # llama.cpp's own phi3 expects o_proj to be square; unfused it is Llama
    "phi3": replace(
        OWN,
        rope_types=(*DIVIDED, "longrope"),
        partly_rotary=True,
        fused={"qkv_proj": INPUTS, "gate_up_proj": GATED},
    ),
    "gemma": Architecture(
        MODEL_ARCH.GEMMA,
        interleaved=False,
        activations=(*TANH_GELU, "gelu"),  # an old name in Gemma's configs, which means the former
        gain_offset=1.0,
        refusals=(Refusal(when=lambda c: not c.tie_word_embeddings, reason="a head that isn't the embedding"),),
    ),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3,
        interleaved=False,
        biases=(),
        activation="hidden_activation",
        activations=TANH_GELU,
        gain_offset=1.0,
        windows=True,
        refusals=(
            Refusal(
                when=lambda c: c.query_pre_attn_scalar != gemma3_scale(c),
                reason="scores that are scaled by another number than the heads' width",
            ),
            Refusal(when=lambda c: bool(c.attn_logit_softcapping or c.final_logit_softcapping), reason="capped logits"),
            Refusal(when=lambda c: bool(c.use_bidirectional_attention), reason="attention to later tokens"),
        ),
    ),
    "qwen3_moe": Architecture(
        MODEL_ARCH.QWEN3MOE,
        interleaved=False,
        keys=EXPERTS,
        refusals=(
            DENSE_BLOCKS,
            Refusal(when=lambda c: not c.norm_topk_prob, reason="weights of experts whose sum isn't one"),
        ),
    ),
    "mixtral": replace(
        LLAMA, keys={"add_expert_count": "num_local_experts", "add_expert_used_count": "num_experts_per_tok"}
    ),
    "qwen2_moe": Architecture(
        MODEL_ARCH.QWEN2MOE,
        interleaved=False,
        any_width=False,
        keys=EXPERTS | {"add_expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        refusals=(
            DENSE_BLOCKS,
            Refusal(when=lambda c: c.norm_topk_prob, reason="weights of experts whose sum is one"),
            Refusal(when=lambda c: c.tie_word_embeddings, reason="a head that is the embedding"),
        ),
    ),
    "starcoder2": Architecture(
        MODEL_ARCH.STARCODER2,
        interleaved=False,
        any_width=False,
        biases=(*INPUTS, "o_proj", "c_fc", "c_proj"),
        activations=TANH_GELU,
        epsilon="norm_epsilon",
        layer_norm=True,
        refusals=(Refusal(when=lambda c: not c.use_bias, reason="linear layers without a bias"),),
    ),
    "granite": Architecture(
        MODEL_ARCH.GRANITE,
        interleaved=True,
        rope_types=DIVIDED,
        biases=LLAMA.biases,
        keys={
            "add_embedding_scale": "embedding_multiplier",
            "add_attention_scale": "attention_multiplier",
            "add_residual_scale": "residual_multiplier",
            "add_logit_scale": "logits_scaling",
        },
    ),
    "smollm3": Architecture(
        MODEL_ARCH.SMOLLM3,
        interleaved=True,
        refusals=(
            Refusal(
                when=lambda c: list(c.no_rope_layers) != [int((i + 1) % 4 != 0) for i in range(c.num_hidden_layers)],
                reason="rotary angles in other layers than three of each four",
            ),
        ),
    ),
    "arcee": Architecture(MODEL_ARCH.ARCEE, interleaved=True, rope_types=DIVIDED, activations=("relu2",)),
    "seed_oss": OWN,
    "ernie4_5": replace(OWN, interleaved=False),  # transformers has this type's rows in llama.cpp's order
    "phi": Architecture(
        MODEL_ARCH.PHI2,
        interleaved=False,
        any_width=False,
        partly_rotary=True,
        biases=(*INPUTS, "dense", "fc1", "fc2", "lm_head"),
        activations=TANH_GELU,
        epsilon="layer_norm_eps",
        layer_norm=True,
    ),
}
