"""The choice of held-out calibration sequences, which judge plans and the head's gain."""

from dataclasses import replace
from itertools import zip_longest

from eigenslice.data.batches import BESIDE_GROUP, HELD_OUT_GROUP, Batch

FIT_TOKENS = 8_192
"""Tokens that a trial is fitted on: enough to tell plans apart, not enough to make the best of one."""
TRIAL_TOKENS = 4_096
"""Tokens that it is measured on."""
HELD_OUT_TOKENS = 8_192
"""Tokens that the last pass holds out, ..."""
HELD_OUT_SHARE = 8
"""... but no more than one sequence of so many."""


def hold_out(batches: list[Batch], least: int = 1) -> list[Batch]:
    """Return all sequences, a few of them in the held-out group.

    The last sequences of each group are held out, in turns. Nothing is held out if there are fewer than
    `HELD_OUT_SHARE` sequences. Nor if fewer than `least` tokens would be held out, because as many numbers are fitted
    on them.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for number, batch in enumerate(batches):
        if batch.group != BESIDE_GROUP:
            places.setdefault(batch.group, []).extend((number, row) for row in range(len(batch.input_ids)))
    most, tokens, held_out = sum(map(len, places.values())) // HELD_OUT_SHARE, 0, set[tuple[int, int]]()
    for place in (
        p for places_of_round in zip_longest(*map(reversed, places.values())) for p in places_of_round if p is not None
    ):
        if len(held_out) < most and tokens < HELD_OUT_TOKENS:
            held_out.add(place)
            tokens += _rows(batches[place[0]], [place[1]]).tokens
    if tokens < least:
        return batches
    result = []
    for number, batch in enumerate(batches):
        rows = {
            kind: [row for row in range(len(batch.input_ids)) if ((number, row) in held_out) == kind]
            for kind in (False, True)
        }
        result += [_rows(batch, rows[False])] if rows[False] else []
        result += [_rows(batch, rows[True], HELD_OUT_GROUP)] if rows[True] else []
    return result


def trial_batches(batches: list[Batch]) -> list[Batch]:
    """Return a few sequences to fit on and a few other sequences to measure on, in equal shares of all groups.

    Sequences are taken in turns from the groups; several short sequences beside the texts are taken at once. Every
    third sequence is held out. A single sequence serves for both.
    """
    queues: dict[int, list[Batch]] = {}
    longest = max(batch.input_ids.shape[1] for batch in batches)
    for batch in batches:
        rows, length = batch.input_ids.shape
        together = longest // length if batch.group == BESIDE_GROUP else 1
        for start in range(0, rows, together):
            some = _rows(batch, list(range(start, min(start + together, rows))))
            if some.tokens:  # not all of it is padding
                queues.setdefault(batch.group, []).append(some)
    chosen: list[Batch] = []
    room = {False: FIT_TOKENS, True: TRIAL_TOKENS}
    for round_number in range(max(map(len, queues.values()))):
        for group, queue in queues.items():
            is_held_out = round_number % 3 == 2 and group != BESIDE_GROUP
            if round_number < len(queue) and room[is_held_out] > 0:
                room[is_held_out] -= queue[round_number].tokens
                chosen.append(replace(queue[round_number], group=HELD_OUT_GROUP if is_held_out else group))
    if all(batch.group != HELD_OUT_GROUP for batch in chosen):
        *texts, last = [batch for batch in chosen if batch.group != BESIDE_GROUP]
        beside = [batch for batch in chosen if batch.group == BESIDE_GROUP]
        return [*(texts or [last]), *beside, replace(last, group=HELD_OUT_GROUP)]
    return chosen


def _rows(batch: Batch, rows: list[int], group: int | None = None) -> Batch:
    """Some sequences of a batch, in another group if one is given."""
    mask = None if batch.attention_mask is None else batch.attention_mask[rows]
    group = batch.group if group is None else group
    return replace(batch, input_ids=batch.input_ids[rows], attention_mask=mask, group=group)
