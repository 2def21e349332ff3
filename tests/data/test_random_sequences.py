"""Sequences of random tokens beside calibration text."""

import torch

from eigenslice.data import Tokens, random_sequences
from eigenslice.stream import RANDOM_GROUP, Batch
from tests import tiny, words
from tests.words import SPECIAL


def text_tokens(sequences: int, length: int) -> Tokens:
    return Tokens([Batch(tiny.random_ids(sequences, length))], {"sequences": sequences, "seqlen": length})


def added(tokens: Tokens) -> torch.Tensor:
    return torch.cat([batch.input_ids for batch in tokens.batches if batch.group == RANDOM_GROUP])


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
