"""Closed-form updates of sliced weights: ridge regressions, their ridge chosen on held-out tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eigenslice.algebra.cholesky import factor_in_place, solve_in_float32, solve_in_place
from eigenslice.algebra.covariance import add_cross, add_gram

RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Ridges to choose from, as shares of the inputs' mean energy per dimension."""
DEFAULT_RIDGE = 0.1
"""The ridge for too few sequences to hold some out."""
ROUNDING = 1e-5
"""Errors below this share of the outputs' energy are float32 rounding, and say nothing about the ridge."""
COMBINATIONS = 64
"""Random combinations of outputs that ridges are compared on."""


InputsOutputs = tuple[Tensor, Tensor]
"""Inputs (T, n) and outputs (T, m) of some tokens."""


@dataclass
class NormalEquations:
    """Sums over tokens that a least-squares fit of outputs y from inputs a needs; more tokens add up.

    Attributes:
        gram: sum of a a^T, (n, n), float64.
        cross: sum of a y^T, (n, m), float64.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "NormalEquations":
        """No tokens yet, for `inputs` inputs and `outputs` outputs."""
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64, device=device),
            torch.zeros(inputs, outputs, dtype=torch.float64, device=device),
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add tokens: inputs (T, n) and outputs (T, m), multiplied in their dtype and summed in float64."""
        add_gram(self.gram, inputs)
        add_cross(self.cross, inputs, outputs)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Let sums of several processes become their total."""
        self.gram, self.cross = total(self.gram), total(self.cross)

    def solve(self, base: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> "Solution":
        """Ridge regression towards known weights.

        The W (m, n) that minimizes sum |y - W a|^2 + r |W - base|^2, r = ridge * mean diagonal of the Gram matrix:

            W = base + (cross - gram base^T)^T (gram + r I)^-1

        The sums are overwritten, because a second Gram matrix of a wide MLP may not fit into memory.

        Args:
            base: The known weights, (m, n).
            ridge: The ridge, as a share of the mean diagonal.
            dtype: The dtype to solve in, float64, or float32 where the condition allows it.
        """
        level, condition = ridge * self.gram.diagonal().mean().clamp_min(1e-30), 0.0
        if dtype == torch.float32:
            regular = self.gram.float()
            missing = self.cross.float() - regular @ base.float().T
            regular.diagonal().add_(level)
            change, condition = solve_in_float32(regular, missing)
            if change is not None:
                return Solution(base + change.T, torch.float32, condition)
            del regular, missing
        missing = self.cross.addmm_(self.gram, base.T, alpha=-1)
        self.gram.diagonal().add_(level)
        change = solve_in_place(factor_in_place(self.gram), missing)
        return Solution(base + change.T, torch.float64, condition)


@dataclass(frozen=True)
class Solution:
    """The weights that a regression has found.

    Attributes:
        weights: The weights, (m, n), float64.
        dtype: The dtype of the Cholesky factor.
        condition: The condition that float32 was tried at; 0 if it wasn't tried.
    """

    weights: Tensor
    dtype: torch.dtype
    condition: float


@dataclass
class RidgeChoice:
    """The ridge with the least error on held-out tokens, over all fits of a kind so far.

    A single fit has few held-out tokens, and the best ridge changes little from block to block. So errors are divided
    by the error of the unfitted weights and summed over fits. Older errors fade.
    """

    fading: float = 0.8
    errors: dict[float, float] = field(default_factory=lambda: dict.fromkeys(RIDGES, 0.0))

    def choose(
        self,
        fitted: NormalEquations,
        held_out: Iterable[InputsOutputs],
        base: Tensor,
        add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
        part: tuple[int, int] = (0, 1),
    ) -> float:
        """Fit with all ridges on some tokens, and return the best ridge on other tokens.

        Errors are estimated on random combinations of the outputs, in float32. This is enough to compare ridges, at a
        tenth of the cost.

        Args:
            fitted: Sums over the tokens to fit on.
            held_out: The tokens to measure on.
            base: The weights that the ridge pulls towards, (m, n).
            add_up: Function that sums tensors of several processes.
            part: Number of this process, and how many there are. They share the ridges to fit with.
        """
        outputs = base.shape[0]
        combine = torch.eye(outputs, device=base.device)
        if outputs > 2 * COMBINATIONS:
            generator = torch.Generator().manual_seed(0)
            combine = torch.randn(outputs, COMBINATIONS, generator=generator).to(base.device) / COMBINATIONS**0.5
        start = base.float().T
        missing = (fitted.cross @ combine.double() - fitted.gram @ (base.T @ combine.double())).float()
        mean = fitted.gram.diagonal().mean().float().clamp_min(1e-30)
        process, processes = part
        change = missing.new_zeros(len(missing), len(self.errors), missing.shape[1])
        for number, ridge in enumerate(self.errors):
            if number % processes == process:
                regular = fitted.gram.float()
                regular.diagonal().add_(ridge * mean)
                change[:, number] = solve_in_place(factor_in_place(regular), missing.clone())
                del regular  # before the next one
        change = change.flatten(1)
        if processes > 1:
            change = add_up(change)
        # Error of the unfitted weights, energy of all outputs, and the change of the error by each ridge
        sums = torch.zeros(2 + len(self.errors), dtype=torch.float64, device=base.device)
        for tokens in held_out:
            inputs, expected = (part.float() for part in tokens)
            residual = expected - inputs @ start
            sums[0] += residual.square().sum()
            sums[1] += expected.square().sum()
            combined, predicted = residual @ combine, (inputs @ change).unflatten(1, (len(self.errors), -1))
            sums[2:] += (predicted * (predicted - 2 * combined[:, None])).sum((0, 2))
        before, energy, *gained = add_up(sums).tolist()
        before = max(before, ROUNDING * energy, 1e-30)
        for ridge, gain in zip(self.errors, gained, strict=True):
            self.errors[ridge] = self.fading * self.errors[ridge] + 1 + gain / before
        return min(self.errors, key=lambda ridge: self.errors[ridge])
