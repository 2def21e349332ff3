"""What MLP neurons read, fitted on transformers' own model in float64: the reference of `neuron_readers`."""

from typing import Any

import torch
from torch import Tensor

READER_STEPS, READER_RIDGE = 3, 0.1


def fit_readers(fit: Any, site: int, missing: Tensor, share: Tensor, z: Tensor, columns: Tensor) -> None:
    """A Gauss-Newton step of what the kept neurons read, in the Krylov space of its least-squares problem.

    Slopes are finite differences of the model itself.

    Args:
        fit: The state of the fit, a `Fit` of `reference_twin`.
        site: Theirs.
        missing: (tokens, width), times `share`.
        share: Weight of each token.
        z: What they read, (tokens, width).
        columns: Columns of the writer in the basis, (width, kept). Before a norm, they are times its gain, (D, kept).
    """
    writer, some = fit.mlps[site], fit.kept[fit.mlps[site]]
    count = fit.sliced.get_submodule(writer).weight.numel() // len(fit.basis)
    kinds = [
        (fit.sliced.get_submodule(name), some + part * count)
        for name, parts in fit.readers[site].items()
        for part in range(parts)
    ]

    def nudged(module: Any, rows: Tensor, by: float) -> Tensor:
        def hook(_: Any, args: Any, output: Tensor) -> Tensor:
            return output.index_add(-1, rows, torch.full((*output.shape[:-1], len(rows)), by).to(output))

        handle = module.register_forward_hook(hook)
        given = fit.inputs(fit.sliced, [writer])[writer][:, some]
        handle.remove()
        return given

    slopes = torch.stack([(nudged(*kind, 1e-5) - nudged(*kind, -1e-5)) / 2e-5 * share for kind in kinds], 1)

    def curve(p: Tensor) -> Tensor:  # (kinds, kept, width), the curvature of some of the tokens
        s, x = slopes[:: fit.twin.stride], z[:: fit.twin.stride]
        errors = torch.einsum("tkn,knw,tw,on->to", s, p, x, columns)
        return torch.einsum("tkn,to,on,tw->knw", s, errors, columns, x) * len(z) / len(x) + level * p

    weights = columns.square().sum(0) * slopes.square().sum(0)  # (kinds, kept)
    second = (share * z).T @ (share * z)
    level = READER_RIDGE * weights.mean() * second.diagonal().mean() / len(z)
    inverse = torch.linalg.inv(second / second.diagonal().mean() + torch.eye(len(second)))
    scale = (weights + 0.05 * weights.mean(1, keepdim=True))[..., None]
    right = torch.einsum("tkn,to,on,tw->knw", slopes, missing, columns, z)
    space: list[Tensor] = []
    for _ in range(READER_STEPS):
        image = curve(space[-1]) if space else right
        space.append(image @ inverse / scale)
        space[-1] = space[-1] / space[-1].norm()
    rows = torch.linalg.qr(torch.stack([p.flatten() for p in space], 1)).Q.T.reshape(-1, *right.shape)
    images = torch.stack([curve(p) for p in rows])
    matrix = torch.einsum("iknw,jknw->ij", rows, images)
    best = torch.linalg.solve(matrix, (rows * right).sum((1, 2, 3)))
    for (module, where), change in zip(kinds, torch.einsum("i,iknw->knw", best, rows), strict=True):

        def hook(_: Any, args: Any, output: Tensor, where: Tensor = where, change: Tensor = change) -> Tensor:
            return output.index_add(-1, where, (fit.seen[site] @ change.T.to(fit.seen[site])).to(output))

        module.register_forward_hook(hook)
