"""Beginnings and sequences of random tokens beside calibration text."""

from typing import Any

import torch

from eigenslice.data import Tokens, beginnings, random_sequences
from eigenslice.data.batches import BESIDE_GROUP, Batch
from tests import tiny, words
from tests.words import SPECIAL


def text_tokens(sequences: int, length: int) -> Tokens:
    return Tokens([Batch(tiny.random_ids(sequences, length))], {"sequences": sequences, "seqlen": length})


def added(tokens: Tokens) -> torch.Tensor:
    return torch.cat([batch.input_ids for batch in tokens.batches if batch.group == BESIDE_GROUP])


class Tokenizer:
    """Puts some tokens before each text, and has no special ones."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, *before: int) -> None:
        self._before = list(before)

    def __call__(self, text: str) -> dict[str, Any]:
        assert not text
        return {"input_ids": self._before}


def test_the_whole_vocabulary_comes_once_before_a_token_comes_again() -> None:
    tokenizer = words.tokenizer()
    result = random_sequences(text_tokens(8, 31), tokenizer, tiny.VOCABULARY, 0.75, seed=0)
    ids = added(result)
    ordinary = sorted(set(range(tiny.VOCABULARY)) - set(SPECIAL.values()))
    assert ids.shape == (6, 31)
    assert sorted(ids.flatten()[: len(ordinary)].tolist()) == ordinary
    assert sorted(ids.flatten()[len(ordinary) : 2 * len(ordinary)].tolist()) == ordinary
    assert result.description["random_sequences"] == 6


def test_tokens_that_the_model_does_not_have_are_left_out() -> None:
    result = random_sequences(text_tokens(8, 40), words.tokenizer(), 50, 1.0, seed=0)
    assert int(added(result).max()) == 49


def test_the_text_stays_as_it_is_and_no_share_adds_nothing() -> None:
    tokens = text_tokens(4, 16)
    result = random_sequences(tokens, words.tokenizer(), tiny.VOCABULARY, 0.25, seed=0)
    assert result.batches[0] is tokens.batches[0]
    assert random_sequences(tokens, words.tokenizer(), tiny.VOCABULARY, 0.0, seed=0) is tokens


def test_seeds_differ_and_one_seed_repeats() -> None:
    def draw(seed: int) -> torch.Tensor:
        return added(random_sequences(text_tokens(4, 16), words.tokenizer(), tiny.VOCABULARY, 1.0, seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_beginnings_are_cut_out_of_all_sequences() -> None:
    tokens = text_tokens(8, 64)
    ids = tokens.batches[0].input_ids
    result = beginnings(tokens, Tokenizer(), tiny.VOCABULARY, seed=0)
    rows = added(result)
    assert rows.shape == (8, 4)  # 8 x 64 / 16 tokens
    for sequence, row in zip(ids.tolist(), rows.tolist(), strict=True):
        assert row in [sequence[start : start + 4] for start in range(61)]
    assert result.batches[0] is tokens.batches[0]
    assert result.description["beginnings"] == 8


def test_every_second_beginning_has_what_the_tokenizer_puts_before_a_text() -> None:
    plain = added(beginnings(text_tokens(8, 64), Tokenizer(), tiny.VOCABULARY, seed=0))
    rows = added(beginnings(text_tokens(8, 64), Tokenizer(1), tiny.VOCABULARY, seed=0))
    assert torch.equal(rows[::2], plain[::2])
    assert rows[1::2, 0].tolist() == [1] * 4
    assert torch.equal(rows[1::2, 1:], plain[1::2, :3])


def test_special_tokens_take_turns_in_every_eighth_beginning() -> None:
    rows = added(beginnings(text_tokens(64, 64), words.tokenizer(), vocabulary=3, seed=0))
    assert rows[7::8, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]  # <unk> is 3, which this model lacks


def test_too_little_text_has_no_beginnings() -> None:
    tokens = text_tokens(3, 16)
    assert beginnings(tokens, Tokenizer(), tiny.VOCABULARY, seed=0) is tokens


def test_sequences_shorter_than_a_beginning_are_beginnings() -> None:
    assert added(beginnings(text_tokens(64, 3), Tokenizer(), tiny.VOCABULARY, seed=0)).shape == (4, 3)
