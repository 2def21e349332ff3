"""Fitting what the neurons of a sliced MLP read, so that those that are left do more of what all did.

The MLP is linear in its writer, which is fitted first, but not in its readers. A Gauss-Newton step makes it so: with
what a neuron gives replaced by its tangent, the readers' best change is a least-squares problem with as many unknowns
as they have weights. It is too large to factor; a few conjugate gradients come near enough, and stop before they fit
what only these tokens have.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.conjugate import conjugate_gradients
from eigenslice.algebra.covariance import gram_matrix
from eigenslice.arch import Sublayer
from eigenslice.runtime.offload import Offload
from eigenslice.runtime.ranks import Ranks
from eigenslice.stream.runner import captured_inputs
from eigenslice.stream.walk import Activations

STEPS = 3
"""Conjugate gradients. With more, what is gained on other text is lost on text of other kinds."""
CURVATURE_TOKENS, LARGEST_STRIDE = 16_384, 4
"""The curvature is that of so many tokens or more, but of a quarter in any case; the gradient, which leads, of all."""
RIDGE = 0.1
"""As a share of the mean curvature per weight."""
FLOOR = 0.05
"""The least curvature of a reader's row that the preconditioner reckons with, as a share of the mean of its kind."""
SMALLEST = 1e-30


@dataclass(frozen=True)
class Readers:
    """The readers of an MLP's neurons, in a layer that has their weights.

    Attributes:
        layer: The decoder layer.
        site: Number of the site that they are at.
        sublayer: The MLP; it has one writer.
        names: Theirs, as far as the layer has them.
    """

    layer: Any
    site: int
    sublayer: Sublayer
    names: tuple[str, ...]

    @property
    def writer(self) -> str:
        """Name of the writer."""
        return self.sublayer.neuron_writer

    def rows(self, name: str) -> int:
        """How many outputs a reader has."""
        return self.sublayer.turn(name, tuple(self.layer.get_submodule(name).weight.shape))[0]

    def linearize(self, normalized: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What they read, (B, T, width), and how what the neurons give depends on what each of their rows does.

        Nothing joins two neurons, so that the derivatives of the sum of all are those of each.

        Args:
            normalized: The sliced stream as the layer has normed it, (B, T, width).
            kwargs: What the layer is called with beside it.

        Returns:
            The former, and slopes, (B, T, rows): for each reader those of all neurons, of a fused one twice.
        """
        names = self.names
        outputs: dict[str, Tensor] = {}

        def part(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
            return lambda _, args, output: outputs.setdefault(name, output.detach().requires_grad_())

        handles = [self.layer.get_submodule(name).register_forward_hook(part(name)) for name in names]
        with torch.enable_grad():
            try:
                with captured_inputs(self.layer, [names[0], self.writer], stop=True) as inputs:
                    self.layer.update(self.site, normalized, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            slopes = torch.autograd.grad(inputs[self.writer].sum(), [outputs[name] for name in names])
        return inputs[names[0]].detach(), torch.cat(slopes, dim=-1)


@dataclass(frozen=True)
class Errors:
    """A batch as a fit of readers sees it.

    Attributes:
        activations: The batch.
        normalized: The sliced stream as the layer has normed it, (B, T, width).
        kwargs: What the layer is called with beside it.
        missing: What the MLP should write beyond what it does, (tokens, width), times `weight`.
        weight: Of each token, (tokens, 1).
    """

    activations: Activations
    normalized: Tensor
    kwargs: dict[str, Any]
    missing: Tensor
    weight: Tensor


def curvature_stride(tokens: int) -> int:
    """Of how many tokens one is enough for the curvature, if there are so many."""
    return min(LARGEST_STRIDE, max(1, tokens // CURVATURE_TOKENS))


def fit_readers(
    readers: Readers,
    batches: Iterable[Errors],
    writer: Tensor,
    offload: Offload,
    stride: int,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], float]:
    """The change of an MLP's readers that lets it write most of what is missing, to first order.

    With s the slopes of what the neurons give, x what their readers read and d their columns of the writer, it is the
    P (rows, width) that minimizes, by `STEPS` conjugate gradients, the sum over tokens of
    |missing - sum_r s_r (P x)_r d_r|^2 + ridge |P|^2.

    The preconditioner takes slopes and what is read to be independent: then the curvature is a Kronecker product.

    Args:
        readers: Which.
        batches: The tokens to fit on.
        writer: (width, neurons), as it has been fitted.
        offload: Where slopes live: the size of what all readers give, for each token that the curvature has.
        stride: It has every so many.
        ranks: Who share the tokens.

    Returns:
        By name, the change of each reader's weight, out x in, float64; and the sum of |missing|^2 without it.
    """
    neurons, device = writer.shape[1], writer.device
    held = offload.tensors(), offload.tensors()  # slopes times weight, and what is read
    passed, squares = 0, torch.zeros(1, dtype=torch.float64, device=device)
    weight = readers.layer.get_parameter(readers.sublayer.weight(readers.names[0]))
    columns = writer.to(torch.promote_types(weight.dtype, torch.float32))
    rows, width = [readers.rows(name) for name in readers.names], writer.shape[0]
    shapes = (sum(rows), width), (width, width), (sum(rows),)
    # The gradient, the second moment of what is read, each row's own curvature
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    for batch in batches:
        a, dtype = batch.activations, batch.normalized.dtype
        read, slopes = readers.linearize(batch.normalized, batch.kwargs)
        read, slopes = a.rows(read), a.rows(slopes) * batch.weight
        sums[0] += _backward(slopes, read, batch.missing @ columns)
        sums[1] += gram_matrix(read * batch.weight)
        sums[2] += slopes.square().sum(0)
        squares += batch.missing.square().sum()
        for tensors, tensor in zip(held, (slopes, read), strict=True):
            tensors.append(tensor[-passed % stride :: stride].to(dtype, copy=True))
        passed += len(read)
    gradient, moment, curvature = (ranks.sum(total) for total in sums)
    tokens, some = ranks.sum(torch.tensor([passed, -(-passed // stride)], dtype=torch.float64, device=device))
    share = some / tokens

    kinds = curvature.view(-1, neurons) * columns.square().sum(0).double()
    level = RIDGE * kinds.mean() * moment.diagonal().mean() / tokens
    kinds = (kinds + FLOOR * kinds.mean(1, keepdim=True)).clamp_min(SMALLEST).view(-1, 1)
    mean = moment.diagonal().mean().clamp_min(SMALLEST)
    inverse = torch.linalg.inv(moment / mean + torch.eye(width, dtype=torch.float64, device=device))

    def product(change: Tensor) -> Tensor:
        total = torch.zeros_like(change)
        for slopes, read in zip(*held, strict=True):
            slopes, read = slopes.to(columns.dtype), read.to(columns.dtype)
            given = (read @ change.T.to(columns.dtype)).mul_(slopes).unflatten(1, (-1, neurons)).sum(1)
            total += _backward(slopes, read, given @ columns.T @ columns)
        return ranks.sum(total) / share + level * change

    change = conjugate_gradients(product, gradient, lambda x: x @ inverse / kinds, STEPS)
    for tensors in held:
        tensors.clear()
    changes = dict(zip(readers.names, ranks.decide(change).split(rows), strict=True))
    return changes, float(ranks.decide(ranks.sum(squares)))


def _backward(slopes: Tensor, read: Tensor, errors: Tensor) -> Tensor:
    """The gradient of a sum over tokens with respect to readers, (rows, width), float64.

    Args:
        slopes: (tokens, rows).
        read: (tokens, width).
        errors: The gradient with respect to what the neurons give, (tokens, neurons).
    """
    kinds = slopes.unflatten(1, (-1, errors.shape[1]))
    return ((kinds * errors[:, None]).flatten(1).T @ read).double()
