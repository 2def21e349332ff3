"""How much a token's row of the embedding looks like those of the tokens that the texts use."""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

RIDGE = 1e-3
"""Ridge over the mean of the Gram matrix's diagonal."""


def likeness(pieces: Callable[[], Iterator[Tensor]], used: Collection[int]) -> Tensor:
    """Predict by ridge regression on the embedding whether the texts use a token.

    Models give words of one language, and pieces of code, embeddings that lie together. So tokens that these texts
    happen not to have, but texts of their kind do, get high values.

    Args:
        pieces: Called twice; each time it gives all rows of the embedding in pieces (n, width).
        used: Ids of the tokens in the texts.

    Returns:
        A value for each row, (rows,), float32. Only the order has a meaning.
    """
    columns = next(pieces()).shape[1] + 1
    gram, sums = torch.zeros(columns, columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
    ids, start = torch.tensor(sorted(used), dtype=torch.long), 0
    for piece in pieces():
        rows = _directions(piece)
        gram += (rows.T @ rows).double()
        sums += rows[ids[(ids >= start) & (ids < start + len(rows))] - start].sum(0).double()
        start += len(rows)
    damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    weights = torch.linalg.solve(damped, sums).float()
    return torch.cat([_directions(piece) @ weights for piece in pieces()])


def _directions(rows: Tensor) -> Tensor:
    """Rows of length one, and a one behind each: (n, width + 1) in float32. The length says how often a token is used
    in general."""
    rows = torch.nn.functional.normalize(rows.float(), dim=1)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
