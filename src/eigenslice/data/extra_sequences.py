"""Sequences beside the calibration texts, cut out of them or drawn from the vocabulary: only to fit layers on."""

import math
from typing import Any

import torch

from eigenslice.data.batches import BESIDE_GROUP
from eigenslice.data.tokens import Tokens, ordinary_tokens

BEGINNING = 4
"""Tokens of a beginning: the first one, and a few that attend to it."""
SPECIAL_EVERY = 8
"""Every so many beginnings start with a special token."""
BEGINNINGS_SHARE = 1 / 16
"""Tokens in beginnings, as a share of the tokens in calibration sequences."""


def beginnings(tokens: Tokens, tokenizer: Any, vocabulary: int, seed: int) -> Tokens:
    """Add many short sequences, cut out of the calibration sequences at random places, for many first tokens.

    Models give the first token of a sequence massive activations, as a sink for attention (arXiv 2309.17453,
    2402.17762). They depend on the first token alone. A sliced model that misses them for a token is wrong about all
    text that begins with this token. Long sequences have too few first tokens for a fit. Measured in
    benchmarks/EXPERIMENTS.md.

    Args:
        tokens: Calibration tokens of texts.
        tokenizer: The model's tokenizer. If it puts special tokens before a text, every second beginning has them, too,
            because models run with and without these tokens. Every eighth beginning has another special token, as in
            chat templates.
        vocabulary: Size of the model's embedding.
        seed: Seed of the places.
    """
    sequences = [row for batch in tokens.batches for row in batch.input_ids]
    length = min(BEGINNING, *map(len, sequences))
    count = int(BEGINNINGS_SHARE * tokens.count) // length
    if not count:
        return tokens
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    special = [torch.tensor([i]) for i in sorted(set(tokenizer.all_special_ids)) if i < vocabulary]
    rows = []
    for number in range(count):
        sequence = sequences[number % len(sequences)]
        start = int(torch.randint(len(sequence) - length + 1, (), generator=generator))
        lead = prefix if number % 2 else prefix[:0]
        if special and number % SPECIAL_EVERY == SPECIAL_EVERY - 1:
            lead = special[number // SPECIAL_EVERY % len(special)]
        rows.append(torch.cat([lead, sequence[start : start + length]])[:length])
    return tokens.with_rows(torch.stack(rows), BESIDE_GROUP, "beginnings")


def random_sequences(tokens: Tokens, tokenizer: Any, vocabulary: int, share: float, seed: int) -> Tokens:
    """Add sequences of random tokens, so that every part of the vocabulary is seen.

    Early MLPs treat each token on its own, and little calibration text lacks many tokens. The dense model gives the
    right output for any token, so no text is needed. Measured in benchmarks/EXPERIMENTS.md.

    Args:
        tokens: Calibration tokens of texts.
        tokenizer: The model's tokenizer; its special tokens are left out.
        vocabulary: Size of the model's embedding.
        share: Number of sequences to add, as a share of the texts' sequences.
        seed: Seed of the order. Every token comes once before any token comes again.
    """
    length = int(tokens.description["seqlen"])
    count = math.ceil(share * tokens.description["sequences"])
    ids = ordinary_tokens(tokenizer, vocabulary)
    if not count or not len(ids):
        return tokens
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count * length // len(ids))
    order = torch.cat([ids[torch.randperm(len(ids), generator=generator)] for _ in range(rounds)])
    return tokens.with_rows(order[: count * length].view(count, length), BESIDE_GROUP, "random_sequences")
