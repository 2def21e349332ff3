"""Ridge regressions over calibration sequences, their ridge chosen on groups that take turns in being held out."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.refit import DEFAULT_RIDGE, RIDGES, NormalEquations, RidgeChoice, Tokens
from eigenslice.data.batches import BESIDE_GROUP
from eigenslice.runtime.ranks import Ranks
from eigenslice.stream.walk import Activations


class RidgeFits:
    """The fits of a model, one after the other: a kind's ridge is chosen by all of them so far.

    Attributes:
        groups: Those of the sequences that are fitted on.
    """

    def __init__(self, groups: Collection[int], ridge: float | None, ranks: Ranks) -> None:
        """groups: of all ranks; ridge: of all fits, None chooses it if two or more groups are texts."""
        self.groups = frozenset(groups)
        self._held_out = sorted(self.groups - {BESIDE_GROUP})
        self._ridge, self._ranks = ridge, ranks
        self._choices = {kind: RidgeChoice() for kind in ("read", "write", "neurons", "experts")}

    def content(self) -> dict[str, Any]:
        """What it needs to go on; as JSON."""
        return {kind: list(choice.errors.values()) for kind, choice in self._choices.items()}

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from what `content` gave."""
        for kind, errors in content.items():
            self._choices[kind] = RidgeChoice(errors=dict(zip(RIDGES, errors, strict=True)))

    def __call__(
        self,
        kind: str,
        turn: int,
        activations: list[Activations],
        base: Tensor,
        tokens: Callable[[int, Activations], Tokens],
    ) -> Tensor:
        """Ridge regression towards known weights; once its ridge is chosen, on all tokens.

        Args:
            kind: One of those that have a ridge of their own.
            turn: Number of the fit: says which group is held out.
            activations: One per batch.
            base: (m, n).
            tokens: Gives a batch's inputs (T, n) and outputs (T, m).

        Returns:
            The weights, (m, n), float64.
        """
        choosing = self._ridge is None and len(self._held_out) > 1
        held_out = self._held_out[turn % len(self._held_out)] if choosing else None
        batches = [(n, a) for n, a in enumerate(activations) if a.group in self.groups]
        held = [(n, a) for n, a in batches if a.group == held_out]
        sums = NormalEquations.zeros(base.shape[1], base.shape[0], base.device)
        for n, a in batches:
            if a.group != held_out:
                sums.add(*tokens(n, a))
        sums.add_up(self._ranks.sum)
        ridge = DEFAULT_RIDGE if self._ridge is None else self._ridge
        if choosing:
            ridge = self._choices[kind].choose(sums, (tokens(n, a) for n, a in held), base, self._ranks.sum)
            ridge = float(self._ranks.decide(torch.tensor(ridge, dtype=torch.float64, device=base.device)))
            if not self._ranks.first:
                sums = NormalEquations.zeros(base.shape[1], base.shape[0], base.device)
            for n, a in held:
                sums.add(*tokens(n, a))
            sums.add_up(self._ranks.sum)
        return self._ranks.decide(sums.solve(base, ridge))
