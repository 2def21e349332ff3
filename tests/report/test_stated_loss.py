"""The loss in words: what is printed, when a result is called bad, and what is advised."""

import math
from typing import Any

import pytest

from eigenslice.report.manifest_fields import Loss, Manifest
from eigenslice.report.stated_loss import loss_text, loss_warning

MEASURED = {"kl": 0.1, "perplexity_ratio": 1.25, "dense_perplexity": 8.0, "sliced_perplexity": 10.0, "tokens": 4096}


def manifest(loss: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """What of a manifest the words depend on."""
    return {
        "loss": MEASURED | (loss or {}),
        "parameters": {"kept": 0.75},
        "basis": "global",
        "form": "stock",
        "refitted": True,
        "options": {"refit": None, "portable": False},
        "calibration": {"seed": 0, "own_sequences": 8},
    } | changed


def test_the_line_has_both_perplexities_their_ratio_the_divergence_and_the_tokens() -> None:
    assert loss_text(manifest()) == (
        "estimated loss: perplexity x1.250 (8 -> 10) and KL 0.100 nats per token, "
        "on 4,096 held-out tokens of the calibration text"
    )
    assert "estimated loss, before fine-tuning: " in loss_text(manifest(finetune={"steps": 1}))


def test_a_loss_that_is_not_known_is_said_to_be_so() -> None:
    assert loss_text({"loss": {"not_measured": "no text"}}) == "loss not measured: no text"
    assert loss_text({}) == "loss not measured: the manifest is of an older version"
    assert not loss_warning({"loss": {"not_measured": "no text"}})
    assert not loss_warning({})


@pytest.mark.parametrize(
    ("loss", "warned"),
    [
        ({"perplexity_ratio": 2.0}, False),
        ({"perplexity_ratio": 2.01}, True),
        ({"kl": math.log(2) - 0.01}, False),
        ({"kl": math.log(2) + 0.01}, True),  # on text that the dense model would write, exp(KL) is the ratio
        ({"kl": 1e6}, True),
        ({"perplexity_ratio": 0.5}, False),
    ],
)
def test_a_result_is_bad_where_either_ratio_is_over_two(loss: dict[str, Any], warned: bool) -> None:
    assert bool(loss_warning(manifest(loss))) == warned


BAD = {"perplexity_ratio": 8.5, "kl": 2.3}


def test_the_warning_tells_the_loss_and_what_to_do() -> None:
    text = loss_warning(manifest(BAD))
    for part in ("KL 2.300 nats", "x8.500", "75.0 %", "--form custom", "--samples", "--calibration", "finetune"):
        assert part in text
    assert "--no-refit" not in text
    assert "--own-text" not in text


@pytest.mark.parametrize(
    ("changed", "advised", "not_advised"),
    [
        ({"form": "custom"}, "--form stock", "--form custom"),
        ({"form": "custom", "basis": "per-block", "refitted": False}, "--basis global", "--form"),
        ({"options": {"refit": False}, "refitted": False}, "--no-refit", "--own-text"),
        ({"options": {"portable": True}}, "--samples", "--form"),
        ({"calibration": {"seed": 0}}, "--own-text", "--basis"),
        ({"calibration": {}}, "--samples", "--own-text"),  # token ids
    ],
)
def test_only_what_the_run_did_not_do_is_advised(changed: dict[str, Any], advised: str, not_advised: str) -> None:
    text = loss_warning(manifest(BAD, **changed))
    assert advised in text
    assert not_advised not in text


def test_a_manifest_has_numbers_or_a_reason() -> None:
    field = Manifest.__pydantic_fields__["loss"]
    assert field.default is None
    assert Loss.model_validate(MEASURED).tokens == 4096
    for wrong in ({"kl": math.nan}, {"kl": -1.0}, {"tokens": 0}, {"perplexity_ratio": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Loss.model_validate(MEASURED | wrong)
