"""Fitting the readers of a sliced MLP's neurons, so that the kept neurons make up for the cut ones.

The MLP is linear in its writer, which is fitted first, but not in its readers. A Gauss-Newton step replaces each
neuron's output by its tangent. The readers' best change then is a least-squares problem with as many unknowns as the
readers have weights. The problem is too large to factor. A few conjugate gradients come near enough, and stop before
they fit the peculiarities of these tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.conjugate import conjugate_gradients
from eigenslice.algebra.covariance import add_cross, add_gram
from eigenslice.arch import Sublayer
from eigenslice.model.dense import Tensors
from eigenslice.runtime.device import trim_memory
from eigenslice.stream.run import Run
from eigenslice.stream.runner import captured_inputs
from eigenslice.stream.walk import Activations

CONJUGATE_GRADIENTS = 3
"""Steps of conjugate gradients. More steps gain on text of the same kind, and lose on text of other kinds."""
CURVATURE_TOKENS, LARGEST_STRIDE = 16_384, 4
"""The curvature is that of so many tokens or more, but of a quarter in any case; the gradient, which leads, of all."""
STEP_SHARES = (1.0, 0.5, 0.25, 0.0)
"""Shares of a Gauss-Newton step, which is right to first order only: the largest one is taken that lets errors grow no
larger."""
RIDGE = 0.1
"""The ridge, as a share of the mean curvature per weight."""
FLOOR = 0.05
"""The least curvature of a reader's row that the preconditioner reckons with, as a share of the mean of its kind."""
SMALLEST = 1e-30


@dataclass(frozen=True)
class Readers:
    """The readers of an MLP's neurons, in a layer that has their weights.

    Attributes:
        layer: The decoder layer.
        site: Number of their site.
        sublayer: The MLP; it has one writer.
        names: Names of the readers that the layer has.
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
        """Number of a reader's outputs."""
        return self.sublayer.transpose_shape(name, tuple(self.layer.get_submodule(name).weight.shape))[0]

    @property
    def width(self) -> int:
        """Number of the readers' inputs."""
        return self.sublayer.transpose_shape(
            self.names[0], tuple(self.layer.get_submodule(self.names[0]).weight.shape)
        )[1]

    def linearize(self, normalized: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the readers' input and the slopes of the neurons' outputs by each reader's row.

        Nothing joins two neurons, so the derivatives of the sum of all outputs are the derivatives of each output.

        Args:
            normalized: The sliced stream as the layer has normed it, (B, T, width).
            kwargs: The other arguments of the layer.

        Returns:
            The input, (B, T, width), and slopes, (B, T, rows): for each reader a slope for each neuron, for a fused
            reader two.
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
        kwargs: The other arguments of the layer.
        missing: The part of the MLP's target that it doesn't write, (tokens, width), times `weight`.
        weight: Weight of each token, (tokens, 1).
    """

    activations: Activations
    normalized: Tensor
    kwargs: dict[str, Any]
    missing: Tensor
    weight: Tensor


def curvature_stride(tokens: int) -> int:
    """Return the number of tokens of which one is enough for the curvature."""
    return min(LARGEST_STRIDE, max(1, tokens // CURVATURE_TOKENS))


def fit_readers(
    readers: Readers, batches: Iterable[Errors], writer: Tensor, run: Run, stride: int
) -> tuple[dict[str, Tensor], float]:
    """Find the change of an MLP's readers that lets it write most of the missing output, to first order.

    Let s be the slopes of the neurons' outputs, x the input of the readers, and d the neurons' columns of the writer.
    The change P (rows, width) minimizes the sum over tokens of |missing - sum_r s_r (P x)_r d_r|^2 + ridge |P|^2, by
    `CONJUGATE_GRADIENTS` steps.

    Args:
        readers: The readers.
        batches: The tokens to fit on.
        writer: The writer's weight, (width, neurons), as it has been fitted.
        run: The run. Its offload holds the slopes: for each token of the curvature, as many as readers have outputs.
        stride: Distance of the tokens that the curvature is computed on.

    Returns:
        The change of each reader's weight by name, out x in, in at least float32; and the sum of |missing|^2 without
        the change.
    """
    neurons, device, ranks = writer.shape[1], writer.device, run.ranks
    curved = run.offload.tensors(), run.offload.tensors()  # slopes times weight, and the readers' input
    passed, squares = 0, torch.zeros(1, dtype=torch.float64, device=device)
    weight = readers.layer.get_parameter(readers.sublayer.weight(readers.names[0]))
    columns = writer.to(torch.promote_types(weight.dtype, torch.float32))
    rows, width = [readers.rows(name) for name in readers.names], readers.width
    shapes = (sum(rows), width), (width, width), (sum(rows),)
    # The gradient, the second moment of the input, each row's own curvature
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    for batch in batches:
        rows_of, dtype = batch.activations.rows, batch.normalized.dtype
        read, slopes = readers.linearize(batch.normalized, batch.kwargs)
        read, slopes = rows_of(read), rows_of(slopes) * batch.weight
        _add_backward(sums[0], slopes, read, batch.missing @ columns)
        add_gram(sums[1], read * batch.weight)
        sums[2] += slopes.square().sum(0)
        squares += batch.missing.square().sum()
        for tensors, tensor in zip(curved, (slopes, read), strict=True):
            tensors.append(tensor[-passed % stride :: stride].to(dtype, copy=True))
        passed += len(read)
    gradient, moment, curvature = map(ranks.sum, sums)
    gradient = gradient.to(columns.dtype)  # the unknowns may be the largest numbers of a run, and few steps are taken
    sums.clear()
    tokens, some = ranks.sum(torch.tensor([passed, -(-passed // stride)], dtype=torch.float64, device=device))
    share = some / tokens

    kinds = curvature.view(-1, neurons) * columns.square().sum(0).double()
    level = RIDGE * kinds.mean() * moment.diagonal().mean() / tokens

    def product(change: Tensor) -> Tensor:
        trim_memory()
        total = torch.zeros_like(change)  # few steps follow a direction: float32 is exact enough
        for slopes, read in zip(*curved, strict=True):
            slopes, read = slopes.to(columns.dtype), read.to(columns.dtype)
            given = (read @ change.T).mul_(slopes).unflatten(1, (-1, neurons)).sum(1)
            _add_backward(total, slopes, read, given @ columns.T @ columns)
        return ranks.sum(total).div_(share).add_(change, alpha=float(level))

    change = conjugate_gradients(product, gradient, _preconditioner(kinds, moment), CONJUGATE_GRADIENTS)
    for tensors in curved:
        tensors.clear()
    changes = dict(zip(readers.names, ranks.decide(change).split(rows), strict=True))
    return changes, float(ranks.decide(ranks.sum(squares)))


def _preconditioner(kinds: Tensor, moment: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the inverse of the curvature if slopes and inputs are independent: then it is a Kronecker product.

    Args:
        kinds: Curvature of each reader's row, one line for each kind of reader, (kinds, neurons).
        moment: Second moment of the input, (width, width).
    """
    curvature = (kinds + FLOOR * kinds.mean(1, keepdim=True)).clamp_min(SMALLEST).view(-1, 1)
    mean = moment.diagonal().mean().clamp_min(SMALLEST)
    inverse = torch.linalg.inv(moment / mean + torch.eye(len(moment), dtype=torch.float64, device=moment.device))
    return lambda change: (change @ inverse.to(change.dtype)).div_(curvature.to(change.dtype))


def take_largest_step(
    weights: Tensors, changes: Tensors, put: Callable[[Tensors], None], is_good: Callable[[], bool]
) -> None:
    """Take the largest of `STEP_SHARES` of a change that lets errors grow no larger.

    Args:
        weights: The readers' weights, by name.
        changes: The change of each.
        put: Function that gives the layer other weights.
        is_good: Function that says whether the errors are no larger than before the change.
    """
    for share in STEP_SHARES:
        put({name: weights[name] + share * change for name, change in changes.items()})
        if is_good():
            return


def _add_backward(total: Tensor, slopes: Tensor, read: Tensor, errors: Tensor) -> None:
    """Add the gradient of a sum over tokens with respect to readers.

    Args:
        total: The sum of gradients, (rows, width).
        slopes: Slopes of the neurons' outputs, (tokens, rows).
        read: Input of the readers, (tokens, width).
        errors: Gradient with respect to the neurons' outputs, (tokens, neurons).
    """
    kinds = slopes.unflatten(1, (-1, errors.shape[1]))
    add_cross(total, (kinds * errors[:, None]).flatten(1), read)
