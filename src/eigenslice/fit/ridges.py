"""Ridge regressions over calibration sequences, their ridge chosen on groups that take turns in being held out."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.refit import DEFAULT_RIDGE, RIDGES, InputsOutputs, NormalEquations, RidgeChoice, Solution
from eigenslice.data.batches import BESIDE_GROUP
from eigenslice.errors import EigensliceWarning
from eigenslice.runtime.device import trim_memory
from eigenslice.runtime.precision import EXACT, Precision, products
from eigenslice.runtime.ranks import Ranks
from eigenslice.stream.walk import Activations

InputsOutputsOf = Callable[[int, Activations], InputsOutputs]
"""Takes a batch and its number, and gives the inputs (T, n) and outputs (T, m) of a regression."""


@dataclass(frozen=True)
class Fitting:
    """Options of fitting a sliced model.

    Attributes:
        groups: Groups of the sequences, of all ranks, that layers are fitted on; others run along.
        ridge: The ridge of all fits; None chooses it by holding groups out in turn, if there are two or more.
        reader_stride: Distance of the tokens that the curvature of MLP neurons' readers is computed on. These are
            fitted behind their writer. 0 leaves them as they are.
    """

    groups: Collection[int]
    ridge: float | None = None
    reader_stride: int = 0


class RidgeFits:
    """The fits of a model, one after the other: a kind's ridge is chosen by all of them so far.

    Attributes:
        groups: Groups of the sequences that are fitted on.
    """

    def __init__(self, fitting: Fitting, ranks: Ranks, precision: Precision = EXACT) -> None:
        """Begin without any fit.

        Args:
            fitting: The groups that are fitted on, and the ridge.
            ranks: The processes that share the sequences.
            precision: The precision of Gram matrices and of solving.
        """
        self.groups = frozenset(fitting.groups)
        self._held_out = sorted(self.groups - {BESIDE_GROUP})
        self._ridge, self._ranks = fitting.ridge, ranks
        self._precision, self._told = precision, False
        self._choices = {kind: RidgeChoice() for kind in ("read", "write", "neurons", "experts")}

    def content(self) -> dict[str, Any]:
        """Return all that `restore` needs, as JSON."""
        return {kind: list(choice.errors.values()) for kind, choice in self._choices.items()}

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from an answer of `content`."""
        for kind, errors in content.items():
            self._choices[kind] = RidgeChoice(errors=dict(zip(RIDGES, errors, strict=True)))

    def fit(
        self,
        kind: str,
        fit_number: int,
        activations: list[Activations],
        base: Tensor,
        inputs_outputs: InputsOutputsOf,
    ) -> Tensor:
        """Solve a ridge regression towards known weights; once its ridge is chosen, on all tokens.

        Without groups to fit on, the weights stay as they are.

        Args:
            kind: The kind of the fit; each kind has a ridge of its own.
            fit_number: Number of the fit, which says which group is held out.
            activations: Activations, one per batch.
            base: The known weights, (m, n).
            inputs_outputs: Function that gives a batch's inputs (T, n) and outputs (T, m).

        Returns:
            The weights, (m, n), float32.
        """
        trim_memory()
        if not self.groups:
            return base.float()
        base = base.double()
        choosing = self._ridge is None and len(self._held_out) > 1
        held_out = self._held_out[fit_number % len(self._held_out)] if choosing else None
        batches = [(n, batch) for n, batch in enumerate(activations) if batch.group in self.groups]
        tried = [(n, batch) for n, batch in batches if batch.group == held_out]
        sums = NormalEquations.zeros(base.shape[1], base.shape[0], base.device)
        for n, batch in batches:
            if batch.group != held_out:
                self._add(sums, inputs_outputs(n, batch))
        sums.add_up(self._ranks.sum)
        ridge = DEFAULT_RIDGE if self._ridge is None else self._ridge
        if choosing:
            ridge = self._choices[kind].choose(
                sums,
                (inputs_outputs(n, batch) for n, batch in tried),
                base,
                self._ranks.sum,
                (self._ranks.rank, self._ranks.size),
            )
            ridge = float(self._ranks.decide(torch.tensor(ridge, dtype=torch.float64, device=base.device)))
            if not self._ranks.first:
                sums = NormalEquations.zeros(base.shape[1], base.shape[0], base.device)
            for n, batch in tried:
                self._add(sums, inputs_outputs(n, batch))
            sums.add_up(self._ranks.sum)
        return self._solve(sums, base, ridge).float()

    def _add(self, sums: NormalEquations, inputs_outputs: InputsOutputs) -> None:
        """Add tokens to sums."""
        with products(self._precision.gram):
            sums.add(*inputs_outputs)

    def _solve(self, sums: NormalEquations, base: Tensor, ridge: float) -> Tensor:
        """Solve a regression, and say once if float32 was too inaccurate."""
        solution = solve_shared(sums, base, ridge, self._ranks, self._precision)
        if solution.dtype != self._precision.solve_dtype and not self._told:
            self._told = True
            warnings.warn(
                f"a fit of {base.shape[1]} inputs has a condition of {solution.condition:.0e}, too large for float32: "
                "it is solved in float64, and others like it",
                EigensliceWarning,
                stacklevel=2,
            )
        return solution.weights


def solve_shared(sums: NormalEquations, base: Tensor, ridge: float, ranks: Ranks, precision: Precision) -> Solution:
    """Solve a regression, each rank for its share of the outputs; all ranks get all weights.

    Args:
        sums: Sums over the tokens of all ranks.
        base, ridge: As `NormalEquations.solve`.
        ranks: The processes.
        precision: The precision of solving.
    """
    mine = slice(len(base) * ranks.rank // ranks.size, len(base) * (ranks.rank + 1) // ranks.size)
    with products("float32"):
        part = NormalEquations(sums.gram, sums.cross[:, mine])
        solution = part.solve(base[mine], ridge, precision.solve_dtype)
    if ranks.size == 1:
        return solution
    weights = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    weights[mine] = solution.weights
    return replace(solution, weights=ranks.sum(weights))
