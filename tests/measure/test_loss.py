"""The loss on held-out text against transformers' own models: the one that was sliced, and the one that was saved."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenslice.algebra.refit import NormalEquations
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.data.holdout import hold_out
from eigenslice.evaluation.perplexity import perplexity
from eigenslice.measure import loss as loss_module
from eigenslice.measure.divergence import Head
from eigenslice.measure.loss import Loss, held_out_texts, measure_loss, next_tokens, predicting_rows
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.runtime.ranks import ALONE
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load

SEQUENCES = 17
PADDED = ((4, slice(0, 7)), (8, slice(20, None)), (0, slice(0, 9)))
"""Places of padding; sequences 4 and 8 are held out."""


def sequences(*, padded: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their mask."""
    ids = tiny.structured_ids(SEQUENCES, 24, seed=1)
    mask = torch.ones_like(ids)
    for place in PADDED if padded else ():
        mask[place] = 0
    return ids, mask


def held_out(ids: Tensor, mask: Tensor) -> list[Batch]:
    """The sequences that a run holds out of a file of token ids, which has four parts."""
    parts = [4 * n // len(ids) for n in range(len(ids))]
    batches = [Batch(ids[n : n + 1], mask[n : n + 1], part) for n, part in enumerate(parts)]
    return [batch for batch in hold_out(batches) if batch.group == HELD_OUT_GROUP]


def divergence(dense: Any, sliced: Any, batches: list[Batch]) -> float:
    """KL(dense || sliced) in nats per predicted token, from transformers' logits."""
    total, tokens = 0.0, 0
    for batch in batches:
        mask = batch.attention_mask
        assert mask is not None
        with torch.no_grad():
            p, q = (m(batch.input_ids, attention_mask=mask).logits.double().log_softmax(-1) for m in (dense, sliced))
        counts = (mask[:, 1:] * mask[:, :-1]).bool()
        total += float((p.exp() * (p - q)).sum(-1)[:, :-1][counts].sum())
        tokens += int(counts.sum())
    return total / tokens


CUT: dict[str, dict[str, Any]] = {
    "fitted": {"width": 24},
    "unfitted": {"width": 24, "refit": False},
    "per-block": {"width": 24, "basis": "per-block"},
    "neurons": {"width": 24, "neurons": 32},
}
CASES = [
    *((case, kind, False) for case in ("llama-tied", "opt", "cohere", "gemma", "gemma4_text") for kind in CUT),
    *((case, kind, True) for case in ("llama", "gpt_neox") for kind in CUT),
    ("granitemoe", "fitted", False),
    ("granitemoe", "unfitted", False),
    ("gpt2", "per-block", False),
]


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "mixtral"])
def test_without_refit_nothing_is_solved(case: str, run_slice: Slicer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that measures the loss holds no Gram matrix."""
    monkeypatch.setattr(NormalEquations, "zeros", lambda *_: pytest.fail("a regression"))
    assert run_slice(case, width=24, refit=False).manifest["loss"]["kl"] > 0


@pytest.mark.parametrize(
    ("case", "kind", "padded"), [c for c in CASES if c[1] != "neurons" or c[0] in tiny.WITH_NEURONS]
)
def test_the_manifest_tells_what_the_saved_model_loses(
    case: str, kind: str, padded: bool, run_slice: Slicer, dense_folder: Folders, tmp_path: Path
) -> None:
    """KL from logits in float64; the cross entropies as `eigenslice eval` computes them."""
    ids, mask = sequences(padded=padded)
    file = tmp_path / "sequences.safetensors"
    save_file({"calibration": ids, "attention_mask": mask}, file)
    result = run_slice(case, calibration=CalibrationOptions(data=str(file)), **CUT[kind])
    loss, batches = result.manifest["loss"], held_out(ids, mask)
    dense, sliced = load(dense_folder(case)), load(result.output)
    expected = [perplexity(model, batches) for model in (dense, sliced)]
    assert loss["tokens"] == expected[0].tokens == (6 + 9 + 20 if padded else 2 * 23)
    assert loss["kl"] == pytest.approx(divergence(dense, sliced, batches), rel=1e-4)
    assert loss["kl"] > 1e-3
    assert loss["dense_perplexity"] == pytest.approx(expected[0].perplexity, rel=1e-4)
    assert loss["sliced_perplexity"] == pytest.approx(expected[1].perplexity, rel=1e-4)
    assert loss["perplexity_ratio"] == pytest.approx(expected[1].perplexity / expected[0].perplexity, rel=1e-4)


@pytest.mark.parametrize("basis", ["global", "per-block"])
def test_nothing_is_lost_where_nothing_is_cut(basis: str, run_slice: Slicer) -> None:
    loss = run_slice("llama", width=tiny.WIDTH, basis=basis).manifest["loss"]
    assert 0 <= loss["kl"] < 1e-6
    assert loss["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert loss["tokens"] == 23


@pytest.mark.parametrize("kind", ["fitted", "unfitted", "per-block"])
def test_the_manifest_says_why_there_is_no_loss(kind: str, run_slice: Slicer, tmp_path: Path) -> None:
    file = tmp_path / "few.safetensors"
    save_file({"calibration": tiny.random_ids(7, 24)}, file)
    loss = run_slice("llama", calibration=CalibrationOptions(data=str(file)), **CUT[kind]).manifest["loss"]
    assert list(loss) == ["not_measured"]
    assert "fewer than 8 sequences" in loss["not_measured"]


def test_text_of_the_model_s_own_does_not_count() -> None:
    ids = tiny.random_ids(2, 6)
    batches = [Batch(ids), Batch(ids, group=HELD_OUT_GROUP, own=True), Batch(ids, group=HELD_OUT_GROUP)]
    assert [number for number, _ in held_out_texts(batches)] == [2]


def test_a_token_counts_where_it_and_the_one_before_are_no_padding() -> None:
    ids, stream = torch.arange(10).view(2, 5), torch.randn(2, 5, 3)
    batch = Batch(ids, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]]))
    assert next_tokens(batch).tolist() == [2, 3, 4, 6, 9]
    rows = predicting_rows(batch, stream, 0.0)
    before = torch.stack([stream[0, 1], stream[0, 2], stream[0, 3], stream[1, 0], stream[1, 3]])
    assert torch.allclose(rows, before / before.square().mean(-1, keepdim=True).sqrt())


def test_a_loss_of_many_tokens_is_the_mean_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of three tokens, whatever batch they are in; by the formula in float64."""
    monkeypatch.setattr(loss_module, "ROWS", 3)
    torch.manual_seed(0)
    weight, reading = torch.randn(9, 4), torch.randn(4, 2)
    whole, head = Head(weight, torch.ones(4), torch.randn(9), 0.7, 2.0), Head(weight, reading, None, 0.7, 2.0)
    parts = [(torch.randn(n, 4), torch.randn(n, 2), torch.randint(9, (n,))) for n in (5, 1, 7)]
    loss = measure_loss(whole, head, parts, ALONE)
    rows, others, targets = (torch.cat(kind) for kind in zip(*parts, strict=True))

    def bounded(logits: Tensor) -> Tensor:
        return (2 * torch.tanh(0.7 * logits.double() / 2)).log_softmax(-1)

    assert whole.bias is not None
    p, q = bounded(rows @ whole.weight.T + whole.bias), bounded(others @ (weight @ reading).T)
    assert loss is not None
    assert loss.tokens == 13
    assert loss.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert loss.dense == pytest.approx(float(torch.nn.functional.nll_loss(p, targets)), rel=1e-5)
    assert loss.sliced == pytest.approx(float(torch.nn.functional.nll_loss(q, targets)), rel=1e-5)


def test_a_model_that_breaks_has_no_number() -> None:
    assert "NaN" in Loss(math.nan, 1.0, math.nan, 9).describe()["not_measured"]
    assert Loss(800.0, 1.0, 900.0, 9).describe()["perplexity_ratio"] == math.exp(700)
    assert Loss(-1e-9, 1.0, 1.0, 9).describe()["kl"] == 0.0
