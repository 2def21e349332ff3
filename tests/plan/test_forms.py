"""Which form a result is saved in: the forms of a table in turn, and rotary fields that transformers 4 reads."""

from typing import Any

import pytest
import torch

from eigenslice.arch import TABLES
from eigenslice.checkpoint.source import open_source
from eigenslice.errors import OptionsError
from eigenslice.model.anatomy import Anatomy
from eigenslice.plan.forms import choose_form
from eigenslice.plan.plan import Plan, Sizes
from eigenslice.plan.result_config import stock_config
from tests import tiny
from tests.conftest import Folders
from tests.messages import check_message

ONLY_WHOLE = ["gpt2", "opt", "opt-plain-norms", "phi-tied", "falcon", "falcon-new", "xglm", "olmoe", *tiny.POST_NORMS]
"""Cases of which no type holds a part of the width."""


def plan_of(anatomy: Anatomy, width: int, **options: Any) -> Plan:
    return choose_form(anatomy, Sizes(width), tied=anatomy.can_stay_tied, **options)


@pytest.fixture
def anatomy_of(dense_folder: Folders) -> Any:
    """Gives the anatomy of a case's model."""
    return lambda case: Anatomy.of_config(open_source(str(dense_folder(case))).config)


@pytest.mark.parametrize("model_type", TABLES)
def test_the_last_form_is_the_own_type_in_the_dense_coordinates(model_type: str) -> None:
    table = TABLES[model_type]
    assert table.forms[:-1] == table.stock
    assert all(form.rotated for form in table.stock)
    assert (table.forms[-1].model_type, table.forms[-1].rotated) == (model_type, False)


@pytest.mark.parametrize("case", ONLY_WHOLE)
def test_the_own_type_holds_the_full_width_alone(case: str, anatomy_of: Any) -> None:
    anatomy = anatomy_of(case)
    whole, narrow = (plan_of(anatomy, width) for width in (tiny.WIDTH, 24))
    assert whole.stock is not None
    assert (whole.stock.model_type, whole.rotated) == (anatomy.table.model_type, False)
    assert (narrow.stock, narrow.rotated) == (None, True)
    with pytest.raises(OptionsError, match=f"{anatomy.table.model_type}: the type can't hold this width") as error:
        plan_of(anatomy, 24, choice="stock")
    check_message(error.value, "width 24")


def test_a_form_that_holds_every_width_is_preferred(anatomy_of: Any) -> None:
    plan = plan_of(anatomy_of("llama"), tiny.WIDTH)
    assert plan.stock is TABLES["llama"].stock[0]
    assert plan.rotated


def test_the_custom_class_is_not_rotated_at_full_width_behind_post_norms(anatomy_of: Any) -> None:
    """There, a rotation would cost a matrix for each norm."""
    rotated = {case: plan_of(anatomy_of(case), tiny.WIDTH, choice="custom").rotated for case in ("gemma2", "opt")}
    assert rotated == {"gemma2": False, "opt": True}


def test_bases_of_blocks_are_rotated_at_any_width(anatomy_of: Any) -> None:
    plan = choose_form(anatomy_of("gemma2"), Sizes(tiny.WIDTH), basis="per-block", tied=False)
    assert (plan.stock, plan.rotated) == (None, True)


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
PLAIN = {"rope_type": "default", "rope_theta": 70.0}


def rotary_fields(case: str, rope: dict[str, Any] | None) -> dict[str, Any]:
    """Fields of a stock result's config beside `rope_parameters` that are about rotary angles."""
    model = tiny.CASES[case]
    dense = tiny.tiny_model(model.model_type, model.config | model.extra | {"rope_parameters": rope})
    anatomy = Anatomy.of_config(dense.config)
    values = stock_config(anatomy, plan_of(anatomy, tiny.WIDTH), torch.float32)
    return {key: value for key, value in values.items() if "rope" in key and key != "rope_parameters"}


@pytest.mark.parametrize("case", ["gemma3_text", "olmo3"])
def test_two_kinds_of_attention_have_the_fields_that_transformers_4_reads(case: str) -> None:
    """Gemma 3 reads `rope_local_base_freq` for sliding attention; `rope_scaling` is of full attention in both types."""
    fields = rotary_fields(case, {"full_attention": LINEAR, "sliding_attention": PLAIN})
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert fields == {"rope_theta": 500.0, "rope_scaling": scaling, "rope_local_base_freq": 70.0}


def test_angles_that_transformers_4_does_not_have_get_no_fields() -> None:
    """They would replace the parameters of Gemma 4, whose full attention turns a part of each head."""
    assert rotary_fields("gemma4_text", None) == {}
