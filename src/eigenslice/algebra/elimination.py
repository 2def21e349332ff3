"""Ranking of the input groups of a linear layer by the loss that leaving a group out costs."""

import torch
from torch import Tensor


def rank_groups(gram: Tensor, weight: Tensor, groups: int, ridge: float) -> Tensor:
    """Rank the groups of a linear layer's inputs, the most missed group first.

    Backward elimination: each step removes the group that raises |Y - W A|^2 + r |W - W0|^2 least, with the weights of
    the remaining groups refitted. Let P = (G + r I)^-1. Removing inputs g costs tr(W_g P_gg^-1 W_g^T). Then W_g P_gg^-1
    P_g is subtracted from W, and P_g^T P_gg^-1 P_g from P. This is the Optimal Brain Surgeon; for blocks of weights see
    arXiv 2203.07259, section 3.

    Args:
        gram: Gram matrix G of the inputs, (n, n).
        weight: W0, (m, n).
        groups: Number of groups; each has n / groups inputs.
        ridge: The ridge r, as a share of the mean diagonal of G.

    Returns:
        Numbers of the groups, (groups,), int64.
    """
    size = len(gram) // groups
    level = ridge * gram.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(gram + level * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    weight, left, gone = weight.to(gram.dtype), list(range(groups)), list[int]()
    while len(left) > 1:
        parts = {g: slice(g * size, (g + 1) * size) for g in left}
        inner = {g: torch.linalg.inv(inverse[part, part]) for g, part in parts.items()}
        costs = torch.stack([(weight[:, part] @ inner[g] * weight[:, part]).sum() for g, part in parts.items()])
        out = left.pop(int(costs.argmin()))
        part = parts[out]
        change = inner[out] @ inverse[part]
        weight = weight - weight[:, part] @ change
        inverse = inverse - inverse[:, part] @ change
        gone.append(out)
    return torch.tensor([*left, *reversed(gone)], device=gram.device)
