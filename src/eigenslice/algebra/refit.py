"""Closed-form updates of sliced weights: ridge regressions, their ridge chosen on held-out tokens."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Ridges to choose from, as shares of the inputs' mean energy per dimension."""
DEFAULT_RIDGE = 0.1
"""Where there are too few sequences to hold some out."""
ROUNDING = 1e-5
"""Errors below this share of the outputs' energy are float32 rounding, and say nothing about the ridge."""
COMBINATIONS = 64
"""Random combinations of outputs that ridges are compared on."""


@dataclass
class NormalEquations:
    """Sums over tokens that a least-squares fit of outputs y from inputs a needs; more tokens add up.

    Attributes:
        gram: sum of a a^T, (n, n), float64.
        cross: sum of a y^T, (n, m), float64.
        energy: sum of |y|^2.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "NormalEquations":
        """No tokens yet, for `inputs` inputs and `outputs` outputs."""
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64, device=device),
            torch.zeros(inputs, outputs, dtype=torch.float64, device=device),
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add tokens: inputs (T, n) and outputs (T, m), multiplied in float32 and summed in float64."""
        self.gram += (inputs.T @ inputs).to(torch.float64)
        self.cross += (inputs.T @ outputs).to(torch.float64)
        self.energy += float(outputs.square().sum())

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def select(self, kept: Tensor) -> "NormalEquations":
        """The same fit from some of the inputs."""
        return NormalEquations(self.gram[kept][:, kept], self.cross[kept], self.energy)

    def error(self, weight: Tensor) -> float:
        """Sum over tokens of |y - W a|^2, for W (m, n)."""
        return self.energy + float((weight.T * (self.gram @ weight.T - 2 * self.cross)).sum())

    def solve(self, base: Tensor, ridge: float) -> Tensor:
        """Ridge regression towards known weights.

        The W (m, n) that minimizes sum |y - W a|^2 + r |W - base|^2, r = ridge * mean diagonal of the Gram matrix:

            W = base + (cross - gram base^T)^T (gram + r I)^-1

        Args:
            base: (m, n).
            ridge: As a share of the mean diagonal.
        """
        level = ridge * self.gram.diagonal().mean().clamp_min(1e-30)
        regular = self.gram + level * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        missing = self.cross - self.gram @ base.T
        return base + torch.cholesky_solve(missing, torch.linalg.cholesky(regular)).T


@dataclass
class RidgeChoice:
    """The ridge that errs least on held-out tokens, over all fits of a kind so far.

    One fit's held-out tokens are few, and the best ridge changes little from block to block: errors relative to
    the unfitted weights' are summed up, older ones fading.
    """

    fading: float = 0.8
    errors: dict[float, float] = field(default_factory=lambda: dict.fromkeys(RIDGES, 0.0))

    def choose(self, fitted: NormalEquations, held: NormalEquations, base: Tensor) -> float:
        """Try all ridges on the fit of some tokens, measured on others.

        Errors are estimated on random combinations of the outputs, and in float32: enough to compare ridges, at a
        tenth of the cost.

        Args:
            fitted: Sums over the tokens to fit on.
            held: Sums over the tokens to measure on.
            base: (m, n) weights that the ridge pulls towards.
        """
        outputs = base.shape[0]
        combine = torch.eye(outputs, dtype=base.dtype, device=base.device)
        if outputs > 2 * COMBINATIONS:
            generator = torch.Generator().manual_seed(0)
            combine = torch.randn(outputs, COMBINATIONS, generator=generator, dtype=base.dtype).to(base.device)
            combine /= COMBINATIONS**0.5
        start = base.T @ combine
        missing = (fitted.cross @ combine - fitted.gram @ start).float()
        expected = (held.cross @ combine - held.gram @ start).float()
        before = max(held.error(base), ROUNDING * held.energy, 1e-30)
        gram, measured = fitted.gram.float(), held.gram.float()
        mean = gram.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(gram), device=gram.device)
        for ridge in self.errors:
            change = torch.cholesky_solve(missing, torch.linalg.cholesky(gram + ridge * mean * eye))
            gained = float((change * (measured @ change - 2 * expected)).sum())
            self.errors[ridge] = self.fading * self.errors[ridge] + 1 + gained / before
        return min(self.errors, key=lambda ridge: self.errors[ridge])
