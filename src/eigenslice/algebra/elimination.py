"""Which groups of inputs a linear layer can best do without."""

import torch
from torch import Tensor


def rank_groups(gram: Tensor, weight: Tensor, groups: int, ridge: float) -> Tensor:
    """Groups of a linear layer's inputs, those first that are missed most.

    Backward elimination: of those that are left, the group goes whose removal, the weights of the others refitted,
    raises |Y - W A|^2 + r |W - W0|^2 least. With P = (G + r I)^-1, taking inputs g away costs tr(W_g P_gg^-1 W_g^T); W
    becomes W - W_g P_gg^-1 P_g, and P becomes P - P_g^T P_gg^-1 P_g (the Optimal Brain Surgeon; for blocks of weights
    arXiv 2203.07259, section 3).

    Args:
        gram: Gram matrix G of the inputs, (n, n).
        weight: W0, (m, n).
        groups: How many of n / groups inputs each there are.
        ridge: r, as a share of the mean diagonal of G.

    Returns:
        Their numbers, (groups,), int64.
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
