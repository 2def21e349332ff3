"""Which plans are tried, and which one is taken."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eigenslice.data.batches import Batch
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.plan import Plan
from eigenslice.search import choose as choosing
from eigenslice.search.choose import choose_plan
from eigenslice.search.trials import TOGETHER

RUN: Any = SimpleNamespace(
    tokens=SimpleNamespace(batches=[Batch(torch.zeros(4, 8, dtype=torch.int64))]),
)
MEASUREMENT: Any = None
WIDE = SliceOptions(model="m", output=Path("out"), width=8)


def plan(kind: int, width: int) -> Plan:
    return Plan("global", (width,) * 3, True, None, (16,), kind)


def family(kind: int, *widths: int) -> list[Plan]:
    return [plan(kind, width) for width in widths]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int | None, int]]]:
    """Kinds and widths of the plans that were tried together. The loss is the distance from kind 2 and width 5."""
    calls = []

    def try_plans(run: Any, plans: list[Plan], *others: Any, **options: Any) -> list[float]:
        numbers = [(plan.kv_heads, plan.site_widths[0]) for plan in plans]
        calls.append(numbers)
        return [10.0 * abs((kind or 0) - 2) + abs(width - 5) for kind, width in numbers]

    monkeypatch.setattr(choosing, "try_plans", try_plans)
    monkeypatch.setattr(choosing, "plans_at_once", lambda run, plans: TOGETHER)
    return calls


def test_kinds_are_tried_at_their_first_width_and_the_best_one_at_others(tried: list) -> None:
    families = [family(kind, 9, 8, 7, 6, 5, 4, 3) for kind in (1, 2, 3, 4, 5)]
    best, trials = choose_plan(RUN, families, MEASUREMENT, WIDE)
    assert best == plan(2, 5)
    assert tried == [
        [(1, 9), (2, 9), (3, 9), (4, 9)],
        [(5, 9)],
        [(2, 8), (2, 7)],
        [(2, 6), (2, 5)],
        [(2, 4), (2, 3)],  # the last one wasn't tried for nothing: it could have been better still
    ]
    assert [trial["kl"] for trial in trials][:5] == [14, 4, 14, 24, 34]


def test_where_memory_is_short_fewer_are_tried_at_once(tried: list, monkeypatch: pytest.MonkeyPatch) -> None:
    families = [family(kind, 9, 8, 7, 6, 5, 4, 3) for kind in (1, 2, 3, 4, 5)]
    usual = choose_plan(RUN, families, MEASUREMENT, WIDE)
    tried.clear()
    monkeypatch.setattr(choosing, "plans_at_once", lambda run, plans: 1)
    assert choose_plan(RUN, families, MEASUREMENT, WIDE) == usual
    assert [len(plans) for plans in tried] == [1] * 11


def test_it_ends_where_more_of_the_width_loses_more(tried: list) -> None:
    best, _ = choose_plan(RUN, [family(2, 6, 5, 4, 3, 2, 1)], MEASUREMENT, WIDE)
    assert best == plan(2, 5)
    assert tried == [[(2, 6), (2, 5)], [(2, 4), (2, 3)]]


def test_a_single_plan_is_not_tried(tried: list) -> None:
    assert choose_plan(RUN, [family(1, 9)], MEASUREMENT, WIDE) == (plan(1, 9), [])
    assert not tried


def test_another_way_to_share_out_neurons_does_not_end_the_search(tried: list) -> None:
    families = [[replace(plan(2, 6), neurons_per_block=(12, 20)), *family(2, 6, 5, 4)]]
    best, _ = choose_plan(RUN, families, MEASUREMENT, WIDE)
    assert tried == [[(2, 6), (2, 6), (2, 5)], [(2, 4)]]
    assert best == plan(2, 5)
