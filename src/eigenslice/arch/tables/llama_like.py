"""Llama's layout under other names. Attention masks, rotary angles, biases and inner norms differ."""

from dataclasses import replace

from eigenslice.arch.schema import StockForm
from eigenslice.arch.tables.llama import ATTENTION, MLP, TABLE

UP_DOWN = replace(MLP, readers=("mlp.up_proj",))
"""An MLP without a gate."""


def stays(model_type: str, portable: bool = False) -> tuple[StockForm, ...]:
    """Return the table with a stock form of its own type."""
    return (StockForm(model_type=model_type, portable=portable),)


TABLES = (
    replace(TABLE, model_type="arcee", mlp=UP_DOWN, stock=stays("arcee")),
    replace(TABLE, model_type="cwm", stock=stays("cwm")),
    replace(TABLE, model_type="ministral", stock=stays("ministral")),
    replace(TABLE, model_type="ministral3", stock=stays("ministral3")),
    replace(TABLE, model_type="smollm3", stock=stays("smollm3", portable=True)),
    replace(TABLE, model_type="ernie4_5", stock=stays("ernie4_5")),
    replace(TABLE, model_type="seed_oss", stock=stays("seed_oss", portable=True)),
    replace(TABLE, model_type="helium", heads_span_width=True, stock=()),
    replace(
        TABLE,
        model_type="hunyuan_v1_dense",
        attention=replace(ATTENTION, inner=("self_attn.query_layernorm", "self_attn.key_layernorm")),
        stock=stays("hunyuan_v1_dense"),
    ),
    replace(
        TABLE,
        model_type="apertus",
        attention=replace(ATTENTION, norm="attention_layernorm", inner=("self_attn.q_norm", "self_attn.k_norm")),
        mlp=replace(UP_DOWN, norm="feedforward_layernorm", inner=("mlp.act_fn",)),
        stock=stays("apertus"),
    ),
)
