"""At full width the transformed model is the dense model: every architecture, basis, form and tie."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.plan import request
from eigenslice.plan.plan import Plan
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load, stored_tensors

COMBINATIONS = [
    pytest.param(case, basis, form, untie, id=f"{case}-{basis}-{form}{'-untied' if untie else ''}")
    for case in tiny.CASES
    for basis, form in [("global", "auto"), ("global", "custom"), ("per-block", "auto")]
    for untie in ([False, True] if tiny.CASES[case].tied and basis == "global" else [False])
]


CUSTOM = ("custom", "eigenslice")


def close(actual: torch.Tensor, dense: torch.Tensor) -> None:
    """Within 1e-4 of the largest magnitude."""
    assert (actual - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize(("case", "basis", "form", "untie"), COMBINATIONS)
def test_full_width_is_exact(
    case: str,
    basis: str,
    form: str,
    untie: bool,
    run_slice: Slicer,
    dense_folder: Folders,
    none_held_out: CalibrationOptions,
) -> None:
    result = run_slice(case, width=tiny.WIDTH, basis=basis, form=form, untie=untie, calibration=none_held_out)
    stock = tiny.CASES[case].stock_at_full_width if (basis, form) == ("global", "auto") else None
    assert (result.manifest["form"], result.manifest["model_type"]) == (("stock", stock) if stock else CUSTOM)
    assert result.manifest["tied"] == (tiny.CASES[case].tied and basis == "global" and not untie)
    dense, sliced = load(dense_folder(case)), load(result.output)
    ids = tiny.random_ids(2, 20, seed=5)
    with torch.no_grad():
        expected = dense(ids).logits
        close(sliced(ids).logits, expected)

        # left padding: the second sequence has 6 tokens less
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        padded = ids.masked_fill(mask == 0, 0)
        for attention in ("sdpa", "eager") if dense._supports_sdpa else ("eager",):
            sliced.set_attn_implementation(attention)
            dense.set_attn_implementation(attention)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            real = mask.bool()
            actual = sliced(padded, attention_mask=mask, position_ids=positions).logits[real]
            close(actual, dense(padded, attention_mask=mask, position_ids=positions).logits[real])

        # token by token through the cache
        cache, steps = None, []
        for i in range(ids.shape[1]):
            output = sliced(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        close(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize("case", tiny.POST_NORMS)
def test_a_rotation_behind_post_norms_is_exact(
    case: str, run_slice: Slicer, dense_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full width such results aren't rotated. With a plan that is, a matrix behind each norm rotates its output."""
    choose_form = request.choose_form

    def rotated(*args: Any, **kwargs: Any) -> Plan:
        return replace(choose_form(*args, **kwargs), rotated=True)

    monkeypatch.setattr(request, "choose_form", rotated)
    result = run_slice(case, width=tiny.WIDTH, form="custom")
    assert sum(name.endswith(".project.weight") for name in stored_tensors(result.output)) == 6  # two in each block
    ids = tiny.random_ids(2, 20, seed=5)
    with torch.no_grad():
        close(load(result.output)(ids).logits, load(dense_folder(case))(ids).logits)
