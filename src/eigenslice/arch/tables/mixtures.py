"""Mixtures of experts with Llama's layout: Mixtral, Qwen, GLM, DeepSeek, Granite, MiniMax, OLMoE, gpt-oss, Llama 4.

transformers holds all experts of a layer in one tensor. The router reads the stream, too. The neurons of experts can be
cut, and the neurons of shared experts where configs have one field for both. Whole experts can be cut, too.
"""

from collections.abc import Iterable
from dataclasses import replace

from eigenslice.arch.heads import JOINED, KEYS, QUERIES
from eigenslice.arch.schema import StockForm, Sublayer
from eigenslice.arch.tables import granite, llama

QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
EXPERTS_FIELD = "moe_intermediate_size"
NUMBER, LOCAL, ROUTED = "num_experts", "num_local_experts", "n_routed_experts"
"""Fields of configs with the number of experts."""
GATED = ("gate_proj", "up_proj", "down_proj")


def mixture(
    block: str = "mlp",
    router: str = "gate",
    dense: bool = False,
    shared: str = "",
    more: Iterable[str] = (),
    inner: tuple[str, ...] = (),
    together: bool = False,
) -> Sublayer:
    """Return an MLP that is a mixture of experts.

    Args:
        block: Name of the module.
        router: Name of the router in the module.
        dense: True if some layers have a plain MLP instead.
        shared: Name of the shared experts in the module, which all tokens pass; empty for none.
        more: Names of further readers in the module.
        inner: Names of further parts in the module with a number for each expert.
        together: True if shared experts have a multiple of an expert's neurons.
    """
    plain = [f"{block}.{name}" for name in GATED] if dense else []
    beside = [f"{block}.{shared}.{name}" for name in GATED] if shared else []
    plain += beside
    experts = (f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj")
    return Sublayer(
        norm="post_attention_layernorm",
        modules=(block,),
        readers=(
            *(name for name in plain if not name.endswith("down_proj")),
            *(f"{block}.{name}" for name in (router, *more)),
            experts[0],
        ),
        writers=(*(name for name in plain if name.endswith("down_proj")), experts[1]),
        inner=tuple(f"{block}.{name}" for name in inner),
        stacked=experts,
        can_cut_neurons=True,
        routers=(f"{block}.{router}", *(f"{block}.{name}" for name in inner)),
        gated=experts[:1],
        shared=tuple(beside) if together else (),
    )


def stays(model_type: str) -> tuple[StockForm, ...]:
    """Return the table with a stock form of its own type."""
    return (StockForm(model_type=model_type),)


BIAS = "gate.e_score_correction_bias"
WITH_NORMS = replace(llama.ATTENTION, inner=QK_NORMS)
NORMS_OVER_HEADS = replace(WITH_NORMS, heads={}, why_no_heads=JOINED)
LATENT = replace(
    llama.ATTENTION,
    readers=("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    inner=("self_attn.q_a_layernorm", "self_attn.q_b_proj", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj"),
    heads={
        "self_attn.q_proj": QUERIES,
        "self_attn.q_b_proj": QUERIES,
        "self_attn.kv_b_proj": KEYS,
        "self_attn.o_proj": QUERIES,
    },
)
"""DeepSeek's attention: keys and values pass a narrow layer with a norm of its own."""
GPT_OSS = mixture(router="router")
LLAMA4 = mixture("feed_forward", router="router", dense=True, shared="shared_expert", together=True)

TABLES = (
    replace(llama.TABLE, model_type="mixtral", mlp=mixture(), experts_field=LOCAL, stock=stays("mixtral")),
    replace(
        llama.TABLE,
        model_type="qwen2_moe",
        experts_field=NUMBER,
        mlp=mixture(dense=True, shared="shared_expert", more=["shared_expert_gate"]),
        neurons_field=EXPERTS_FIELD,
        stock=stays("qwen2_moe"),
    ),
    replace(
        llama.TABLE,
        model_type="qwen3_moe",
        experts_field=NUMBER,
        attention=WITH_NORMS,
        mlp=mixture(dense=True),
        neurons_field=EXPERTS_FIELD,
        stock=stays("qwen3_moe"),
    ),
    replace(
        llama.TABLE,
        model_type="glm4_moe",
        experts_field=ROUTED,
        groups_field="n_group",
        attention=WITH_NORMS,
        mlp=mixture(dense=True, shared="shared_experts", inner=(BIAS,), together=True),
        neurons_field=EXPERTS_FIELD,
        stock=stays("glm4_moe"),
    ),
    replace(
        llama.TABLE,
        model_type="deepseek_v2",
        experts_field=ROUTED,
        groups_field="n_group",
        kv_heads=lambda c: c.num_attention_heads,
        attention=LATENT,
        mlp=mixture(dense=True, shared="shared_experts", together=True),
        neurons_field=EXPERTS_FIELD,
        stock=stays("deepseek_v2"),
    ),
    replace(
        llama.TABLE,
        model_type="deepseek_v3",
        experts_field=ROUTED,
        groups_field="n_group",
        kv_heads=lambda c: c.num_attention_heads,
        attention=LATENT,
        mlp=mixture(dense=True, shared="shared_experts", inner=(BIAS,), together=True),
        neurons_field=EXPERTS_FIELD,
        stock=stays("deepseek_v3"),
    ),
    replace(
        llama.TABLE,
        model_type="minimax_m2",
        experts_field=LOCAL,
        attention=NORMS_OVER_HEADS,
        mlp=mixture(inner=("e_score_correction_bias",)),
        stock=stays("minimax_m2"),
    ),
    replace(
        granite.TABLE,
        model_type="granitemoe",
        experts_field=LOCAL,
        mlp=mixture("block_sparse_moe", router="router"),
        stock=(StockForm(model_type="granitemoe", overrides={"residual_multiplier": 1.0}),),
    ),
    replace(
        llama.TABLE,
        model_type="gpt_oss",
        experts_field=LOCAL,
        attention=replace(
            llama.ATTENTION,
            inner=("self_attn.sinks",),
            heads={**llama.ATTENTION.heads, "self_attn.sinks": QUERIES},
        ),
        mlp=replace(GPT_OSS, transposed=GPT_OSS.stacked, interleaved=True),
        stock=(StockForm(model_type="gpt_oss", portable=True),),
    ),
    replace(
        llama.TABLE,
        model_type="llama4_text",
        experts_field=LOCAL,
        mlp=replace(LLAMA4, transposed=LLAMA4.stacked),
        stock=stays("llama4_text"),
    ),
    replace(
        llama.TABLE,
        model_type="phimoe",
        experts_field=LOCAL,
        norm="layer",
        mlp=mixture(router="router"),
        stock=stays("phimoe"),
    ),
    # Norms over all of q and k, as wide as the stream in the config
    replace(llama.TABLE, model_type="olmoe", attention=NORMS_OVER_HEADS, mlp=mixture(), experts_field=NUMBER, stock=()),
)
