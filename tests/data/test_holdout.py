"""Which sequences nothing is fitted on."""

from collections import Counter

import pytest
import torch

from eigenslice.data import holdout
from eigenslice.data.batches import BESIDE_GROUP, HELD_OUT_GROUP, Batch
from eigenslice.data.holdout import hold_out, trial_batches


def sequences(batches: list[Batch]) -> list[tuple[int, list[int]]]:
    """Group and tokens of each sequence."""
    return [(batch.group, row.tolist()) for batch in batches for row in batch.input_ids]


def batch(group: int, rows: int, tokens: int = 10) -> Batch:
    """Sequences that differ from each other and from those of other groups."""
    ids = torch.arange(rows)[:, None] + 1000 * group + 100 * torch.arange(1, tokens + 1)
    return Batch(ids, group=group)


def origin(row: list[int]) -> int:
    return row[0] // 1000


def test_every_third_sequence_of_each_group_is_held_out() -> None:
    given = [batch(0, 6), batch(1, 4), batch(0, 3), batch(2, 9)]
    rows = {group: [row for g, row in sequences(given) if g == group] for group in (0, 1, 2)}
    chosen = sequences(trial_batches(given))
    held = [row for group, row in chosen if group == HELD_OUT_GROUP]
    fitted = [row for group, row in chosen if group != HELD_OUT_GROUP]
    assert sorted(held) == sorted(row for some in rows.values() for row in some[2::3])
    assert sorted(fitted + held) == sorted(row for some in rows.values() for row in some)
    assert all(group == origin(row) for group, row in chosen if group != HELD_OUT_GROUP)


def test_no_token_is_fitted_and_measured_on() -> None:
    chosen = sequences(trial_batches([batch(group, 7) for group in range(5)]))
    held, fitted = ([row for group, row in chosen if (group == HELD_OUT_GROUP) == kind] for kind in (True, False))
    assert held
    assert fitted
    assert not [row for row in held if row in fitted]


def test_groups_have_equal_shares_of_the_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "FIT_TOKENS", 80)
    monkeypatch.setattr(holdout, "TRIAL_TOKENS", 40)
    chosen = sequences(trial_batches([batch(group, 30) for group in range(4)]))
    held, fitted = (Counter(origin(r) for g, r in chosen if (g == HELD_OUT_GROUP) == kind) for kind in (True, False))
    assert held == dict.fromkeys(range(4), 1)
    assert fitted == dict.fromkeys(range(4), 2)


def test_tokens_are_few() -> None:
    chosen = trial_batches([batch(group, 100, tokens=512) for group in range(3)])
    counts = {kind: sum(b.tokens for b in chosen if (b.group == HELD_OUT_GROUP) == kind) for kind in (True, False)}
    assert holdout.TRIAL_TOKENS <= counts[True] < holdout.TRIAL_TOKENS + 512
    assert holdout.FIT_TOKENS <= counts[False] < holdout.FIT_TOKENS + 512


def test_short_sequences_beside_the_texts_are_fitted_on_as_many_at_once_as_a_long_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdout, "FIT_TOKENS", 40)
    chosen = trial_batches([batch(0, 9), batch(1, 9), batch(BESIDE_GROUP, 50, tokens=3)])
    shapes = [(b.group, tuple(b.input_ids.shape)) for b in chosen if b.group != HELD_OUT_GROUP]
    assert shapes == [(0, (1, 10)), (1, (1, 10)), (BESIDE_GROUP, (3, 3)), (0, (1, 10)), (1, (1, 10))]


def test_of_few_sequences_a_text_is_held_out_and_not_what_is_beside_it() -> None:
    chosen = trial_batches([batch(0, 1), batch(1, 1), batch(BESIDE_GROUP, 1)])
    assert [b.group for b in chosen] == [0, BESIDE_GROUP, HELD_OUT_GROUP]
    assert torch.equal(chosen[-1].input_ids, batch(1, 1).input_ids)


def test_padding_counts_for_no_share_and_travels_with_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "FIT_TOKENS", 12)
    ids = torch.arange(90).view(9, 10)
    mask = torch.ones(9, 10, dtype=torch.int64)
    mask[:, :6] = 0
    mask[1] = 0
    chosen = trial_batches([Batch(ids, mask)])
    assert all(b.tokens == 4 for b in chosen)
    assert sum(b.group != HELD_OUT_GROUP for b in chosen) == 3
    for b in chosen:
        assert b.attention_mask is not None
        assert b.attention_mask.tolist() == [[0] * 6 + [1] * 4]
        assert b.input_ids.shape == (1, 10)
    assert ids[1].tolist() not in [row for _, row in sequences(chosen)]


@pytest.mark.parametrize("only_padding", [0, 2])
def test_a_sequence_of_padding_is_neither_fitted_nor_measured_on(only_padding: int) -> None:
    mask = torch.ones(3, 10, dtype=torch.int64)
    mask[only_padding] = 0
    chosen = trial_batches([Batch(batch(0, 3).input_ids, mask)])
    assert [b.tokens for b in chosen] == [10, 10]
    assert sorted(b.group for b in chosen) == [HELD_OUT_GROUP, 0]


def test_a_single_sequence_serves_for_both() -> None:
    (first, second) = trial_batches([batch(0, 1)])
    assert (first.group, second.group) == (0, HELD_OUT_GROUP)
    assert torch.equal(first.input_ids, second.input_ids)


@pytest.mark.parametrize("groups", [[2], [1, 1], [1, 2], [2, 2, 2, 2]])
def test_of_few_sequences_the_last_is_held_out(groups: list[int]) -> None:
    given = [batch(group, rows) for group, rows in enumerate(groups)]
    chosen = sequences(trial_batches(given))
    assert [group == HELD_OUT_GROUP for group, _ in chosen] == [False] * (sum(groups) - 1) + [True]
    assert sorted(row for _, row in chosen) == sorted(row for _, row in sequences(given))


def test_one_sequence_of_eight_is_held_out_from_all_groups_in_turns() -> None:
    given = [batch(0, 9), batch(1, 9), batch(0, 7), batch(BESIDE_GROUP, 4), batch(2, 9)]
    held_out = hold_out(given)
    chosen = sequences(held_out)
    held = [row for group, row in chosen if group == HELD_OUT_GROUP]
    assert Counter(map(origin, held)) == {0: 2, 1: 1, 2: 1}  # 34 // 8
    assert sorted(row for _, row in chosen) == sorted(row for _, row in sequences(given))
    assert all(group == origin(row) for group, row in chosen if group != HELD_OUT_GROUP)


def test_no_more_is_held_out_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "HELD_OUT_TOKENS", 25)
    chosen = hold_out([batch(group, 80) for group in range(2)])
    assert sum(b.tokens for b in chosen if b.group == HELD_OUT_GROUP) == 30
    assert sum(b.tokens for b in chosen) == 1600


def test_of_few_sequences_none_is_held_out() -> None:
    chosen = hold_out([batch(0, 4), batch(1, 3), batch(BESIDE_GROUP, 9)])
    assert all(b.group != HELD_OUT_GROUP for b in chosen)


def test_a_sequence_is_held_out_with_its_padding() -> None:
    mask = torch.ones(8, 10, dtype=torch.int64)
    mask[-1, :4] = 0
    fitted, held = hold_out([Batch(batch(0, 8).input_ids, mask)])
    assert fitted.tokens == 70
    assert held.attention_mask is not None
    assert (held.group, held.attention_mask.tolist()) == (HELD_OUT_GROUP, mask[-1:].tolist())
