"""Tokens whose embeddings are like those of the used ones."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from eigenslice.vocabulary.choice import choose_tokens
from eigenslice.vocabulary.likeness import likeness
from tests.vocabulary.test_choice import specification_of

GROUP = 200


@pytest.fixture(scope="module")
def embedding() -> Tensor:
    """Rows of two kinds of tokens around two directions, of any length; a third of the first kind is used."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 16, generator=generator).repeat_interleave(GROUP, 0)
    rows = centres + 0.6 * torch.randn(2 * GROUP, 16, generator=generator)
    return rows * torch.rand(2 * GROUP, 1, generator=generator)


def test_unused_tokens_of_the_used_kind_come_first(embedding: Tensor) -> None:
    def pieces() -> Iterator[Tensor]:
        yield from embedding.split(37)

    values = likeness(pieces, range(0, GROUP, 3))
    unused = [i for i in range(2 * GROUP) if i not in range(0, GROUP, 3)]
    best = sorted(unused, key=lambda i: -float(values[i]))[:100]
    assert sum(i < GROUP for i in best) > 95


def test_values_are_those_of_ridge_regression(embedding: Tensor) -> None:
    used = [3, 17, 18, 250]
    rows = embedding.double()
    inputs = torch.cat([rows / rows.norm(dim=1, keepdim=True), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    target = torch.zeros(len(rows), dtype=torch.float64)
    target[used] = 1
    root = (1e-3 * inputs.square().sum(0).mean()).sqrt()  # of the damping: least squares with a row for each weight
    augmented = torch.cat([inputs, root * torch.eye(17, dtype=torch.float64)])
    solution = torch.linalg.lstsq(augmented, torch.cat([target, torch.zeros(17, dtype=torch.float64)])).solution
    expected = inputs @ solution
    assert (likeness(lambda: iter(embedding.split(100)), used) - expected).abs().max() < 1e-5


def test_a_number_is_filled_with_what_is_alike() -> None:
    """Among tokens of equal use; what a token is merged from comes along."""
    model = models.BPE({"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}, [("a", "b"), ("b", "a"), ("ab", "a")])
    specification = specification_of(Tokenizer(model))
    assert choose_tokens(specification, {}, (), 3, [0.0, 0.0, 1.0, 2.0, 3.0]) == [0, 1, 3]
    assert choose_tokens(specification, {}, (), 4, [0.0, 0.0, 1.0, 2.0, 3.0]) == [0, 1, 2, 4]
    assert choose_tokens(specification, {2: 1}, (), 3, [0.0, 0.0, 1.0, 2.0, 3.0]) == [0, 1, 2]
