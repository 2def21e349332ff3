"""Writers before a norm, fitted on transformers' own model in float64: the reference of `normed_writers`.

Where a norm of gain g is between a writer W and the stream, W isn't moved into the span of the basis. What the norm
makes of W a, without its gain, goes through a matrix behind the norm, from a hook; in the dense model's own coordinates
it is the norm's gain.
"""

from typing import Any

import torch
from torch import Tensor

from eigenslice.fit.normed_writers import DAMPING
from tests.reference import rms_norm
from tests.reference_readers import fit_readers


def fit_normed_writer(fit: Any, before: int, site: int, stream: Tensor) -> None:
    """Fit a writer before a norm of gain g, and the matrix behind the norm.

    With u what the dense model's writer gives and r the root of its mean square, the target of W a / r is u / r,
    and what g times it should be more so that nothing is missing in the span: the minimum over y of
    |g (y - u / r) - more|^2 + DAMPING mean(g^2) |y - u / r|^2, coordinate by coordinate.

    Args:
        fit: The state of the fit, a `Fit` of `reference_twin`.
        before: The site whose sublayer the norm is behind.
        site: The next site.
        stream: The sliced model's stream at the site before, (tokens, D).
    """
    (name,), Q, P, x = fit.writers[before], fit.basis, fit.basis @ fit.basis.T, fit.dense[site]
    g, u, module = fit.gains[before], fit.unnormed[before], fit.sliced.get_submodule(name)
    a = fit.inputs(fit.sliced, [name])[name]
    some = fit.kept.get(name, torch.arange(a.shape[1]))
    a, weight = a[:, some], module.weight[:, some].double()
    share = fit.inverse_size(x)
    both = share * fit.inverse_size(u)  # g * RMSN(W a) is as far off as W a / r, times g
    own = u * fit.inverse_size(u)
    missing = x / fit.scales[before] - stream
    more = (missing - g * own) @ P
    least = 1e-3 * g.square().mean().sqrt()
    size = torch.where(g.abs() < least, least, g.abs())
    target = own + g * more / (g.square() + DAMPING * size.square().mean())
    y = size * share * target
    if module.bias is not None:
        y = y - size * both * module.bias
    fitted = fit.solve(fit.kinds[before], site, both * a, y, size[:, None] * weight)
    module.weight.zero_()
    module.weight[:, some] = (fitted / size[:, None]).to(module.weight)
    if before in fit.mlps:
        z = fit.norm_at(before, fit.c * stream @ Q)
        fit_readers(fit, before, y - both * a @ fitted.T, both, z, fitted)
    if not fit.twin.rotated:
        return
    post = fit.sliced.get_submodule(fit.posts[before])
    given = rms_norm(fit.inputs(fit.sliced, [fit.posts[before]])[fit.posts[before]], fit.eps)
    base = fit.c * Q.T * g
    project = fit.solve("write", site, share * given, share * fit.c * missing @ Q, base)
    back = (Q @ project / fit.c).T

    def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return rms_norm(args[0], fit.eps) @ back.to(output)

    post.register_forward_hook(hook)
