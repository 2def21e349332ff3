"""Logits over parts of a vocabulary: the same as over the whole of it, by a formula in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eigenslice.fit.gain import _expected, _mean_weight
from eigenslice.measure import divergence
from eigenslice.measure.divergence import Head, kl_of_rows

VOCABULARY, ROWS, WIDTH = 37, 11, 8


def head(width: int, *, bias: bool, cap: float | None = None) -> Head:
    """A dense model's head, whose map is a diagonal, or one of a narrower model; all share one matrix."""
    generator = torch.Generator().manual_seed(width)
    weight = 2 * torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    reading = torch.randn(WIDTH, *([width] if width < WIDTH else []), generator=generator)
    return Head(weight, reading, torch.randn(VOCABULARY, generator=generator) if bias else None, 0.7, cap)


def rows(width: int) -> Tensor:
    return 3 * torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width + 1))


def whole_matrix(head: Head) -> Tensor:
    """The head as one matrix, (vocabulary, width), float64."""
    reading = head.reading.double()
    return head.weight.double() @ (reading.diag() if reading.dim() == 1 else reading)


def reference(head: Head, rows: Tensor, *, bounded: bool = True) -> Tensor:
    """Log probabilities in float64, (n, vocabulary)."""
    logits = rows.double() @ whole_matrix(head).T + (0.0 if head.bias is None else head.bias.double())
    logits = head.scale * logits
    return (head.cap * torch.tanh(logits / head.cap) if head.cap and bounded else logits).log_softmax(-1)


@pytest.fixture(params=[ROWS * 5, ROWS * VOCABULARY, 1], ids=["eight parts", "one part", "one token a part"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergence.LOGITS, "cpu", request.param)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("cap", [None, 4.0], ids=["free", "bounded"])
def test_kl_of_several_heads(bias: bool, cap: float | None) -> None:
    whole, heads = head(8, bias=bias, cap=cap), [head(5, bias=bias, cap=cap), head(8, bias=bias, cap=cap)]
    heads[1] = replace(heads[1], reading=heads[1].reading * 1.01)
    streams = [rows(5), rows(8)]
    p = reference(whole, rows(8))
    for kl, other, stream in zip(kl_of_rows(whole, rows(8), heads, streams), heads, streams, strict=True):
        expected = (p.exp() * (p - reference(other, stream))).sum(-1)
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_chosen_logits_and_totals(bias: bool) -> None:
    one, ids = head(8, bias=bias, cap=4.0), torch.arange(ROWS) % VOCABULARY
    read = one.read(rows(8))
    actual = one.chosen_logits(read, ids) - one.log_total(read)
    expected = reference(one, rows(8))[torch.arange(ROWS), ids]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_the_parts_of_the_gains_objective(bias: bool) -> None:
    """`fit_gain` takes logits without their bound."""
    whole, other = head(8, bias=bias, cap=4.0), head(5, bias=bias)
    log_p, log_q = reference(whole, rows(8), bounded=False), reference(other, rows(5))
    target, known = _expected(whole, rows(8), other)
    torch.testing.assert_close(target.double(), other.scale * log_p.exp() @ whole_matrix(other), rtol=1e-5, atol=1e-5)
    constant = (log_p.exp() * log_p).sum() - (
        0.0 if other.bias is None else other.scale * (log_p.exp() @ other.bias.double()).sum()
    )
    assert known == pytest.approx(float(constant), rel=1e-5, abs=1e-5)
    total, mean = _mean_weight(other, rows(5))
    logits = other.scale * (rows(5).double() @ whole_matrix(other).T + (0.0 if other.bias is None else other.bias))
    torch.testing.assert_close(total.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), log_q.exp() @ whole_matrix(other), rtol=1e-5, atol=1e-5)
