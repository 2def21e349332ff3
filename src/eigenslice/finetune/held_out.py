"""Losses on held-out windows: they decide which step of a training is kept, and say how good the result is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenslice.finetune.objective import parts
from eigenslice.measure.loss import Loss
from eigenslice.runtime.device import device_of
from eigenslice.runtime.ranks import Ranks

OWN_TEXT = "text of the model's own"
"""Name of the group of windows that the teacher wrote."""
NOISE = 2.0
"""Standard errors by which a group's loss may rise and still count as no worse, where they are known from many windows.

Few windows know their standard error badly, and need more of them; see `standard_errors`."""


@dataclass(frozen=True)
class HeldOut:
    """Windows that nothing is trained on.

    Attributes:
        windows: Token ids, (T,) each.
        groups: Name of each window's text.
    """

    windows: list[Tensor]
    groups: list[str]


@dataclass(frozen=True)
class WindowLosses:
    """Losses of each held-out window, summed over its predicted tokens.

    Attributes:
        groups: Name of each window's text.
        sums: KL(teacher || model), cross entropy of the model and of the teacher in nats, and predicted tokens,
            (n, 4), float64. Without a teacher its two columns are 0.
        distill: Share of the KL divergence in the objective.
    """

    groups: list[str]
    sums: Tensor
    distill: float

    @property
    def objective(self) -> Tensor:
        """The objective of the training for each window, in nats per predicted token, (n,)."""
        kl, model, _, tokens = self.sums.T
        return (self.distill * kl + (1 - self.distill) * model) / tokens

    @property
    def mean(self) -> float:
        """The objective over all windows, in nats per predicted token."""
        return float((self.objective * self.sums[:, 3]).sum() / self.sums[:, 3].sum())

    def by_group(self) -> dict[str, float]:
        """Return the objective of each group, in nats per predicted token."""
        return {name: self._only(self._of(name)).mean for name in dict.fromkeys(self.groups)}

    def loss(self) -> Loss | None:
        """Return the loss on windows of texts; None if there are none."""
        texts = torch.tensor([group != OWN_TEXT for group in self.groups])
        if not texts.any():
            return None
        kl, model, teacher, tokens = self.sums[texts].sum(0).tolist()
        return Loss(kl / tokens, teacher / tokens, model / tokens, int(tokens))

    def worse_than(self, before: "WindowLosses") -> dict[str, float]:
        """Return the groups that have become worse by more than noise, with the rise in nats per token.

        The windows are the same before and after. So the standard error of a group's rise is that of the mean of its
        windows' differences.
        """
        rise = self.objective - before.objective
        worse = {}
        for name in dict.fromkeys(self.groups):
            of_group = rise[self._of(name)]
            count = len(of_group)
            spread = float(of_group.std()) / math.sqrt(count) if count > 1 else 0.0
            mean = float(of_group.mean())
            if not mean <= standard_errors(count) * spread:  # NaN is worse, too
                worse[name] = mean
        return worse

    def criterion(self, before: "WindowLosses") -> float:
        """Return the number by which steps are compared, the lowest is best.

        It is the mean objective. Where a group has become worse, it is more than the objective before the training,
        so that such a step is never better than no training.
        """
        worse = self.worse_than(before)
        return self.mean if not worse else max(self.mean, before.mean + max(worse.values()))

    def _of(self, name: str) -> Tensor:
        return torch.tensor([group == name for group in self.groups])

    def _only(self, chosen: Tensor) -> "WindowLosses":
        groups = [group for group, kept in zip(self.groups, chosen.tolist(), strict=True) if kept]
        return WindowLosses(groups, self.sums[chosen], self.distill)


def standard_errors(count: int) -> float:
    """Return the standard errors that a mean of so many windows exceeds as rarely as a normal one exceeds `NOISE`.

    The quantile of Student's t with count - 1 degrees of freedom, by its expansion (Abramowitz and Stegun, 26.7.5).
    """
    x, freedom = NOISE, max(1, count - 1)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Judge:
    """The held-out windows, and the losses that a training begins with.

    Attributes:
        held_out: The windows.
        teacher: The dense model on the device that is trained on, or None.
        distill: Share of the KL divergence in the objective.
        ranks: The processes that share the windows.
        before: Losses before the training.
    """

    held_out: HeldOut
    teacher: Any
    distill: float
    ranks: Ranks
    before: WindowLosses

    @classmethod
    def of(cls, model: Any, held_out: HeldOut, teacher: Any, distill: float, ranks: Ranks) -> "Judge":
        """Measure the model that is to be trained."""
        return cls(held_out, teacher, distill, ranks, measure_windows(model, teacher, held_out, distill, ranks))

    def measure(self, model: Any) -> WindowLosses:
        """Measure a model on the windows."""
        return measure_windows(model, self.teacher, self.held_out, self.distill, self.ranks)


@torch.no_grad()
def measure_windows(model: Any, teacher: Any, held_out: HeldOut, distill: float, ranks: Ranks) -> WindowLosses:
    """Measure a model on held-out windows, beside its teacher.

    Each rank runs the model over its share of the windows. All ranks run it equally often, because the weights may be
    shared among them.

    Args:
        model: The model.
        teacher: The dense model, or None.
        held_out: The windows.
        distill: Share of the KL divergence in the objective.
        ranks: The processes that share the windows.
    """
    was_training = model.training
    model.eval()
    device = device_of(model)
    sums = torch.zeros(len(held_out.windows), 4, dtype=torch.float64, device=device)
    for number in _share(len(held_out.windows), ranks):
        place = min(number, len(held_out.windows) - 1)
        ids = held_out.windows[place][None].to(device)
        expected = None if teacher is None else teacher(input_ids=ids, use_cache=False).logits[0]
        measured = _window_sums(model(input_ids=ids, use_cache=False).logits[0], expected, ids[0])
        if place == number:
            sums[place] = measured
    model.train(was_training)
    return WindowLosses(held_out.groups, ranks.sum(sums).cpu(), distill)


def _share(count: int, ranks: Ranks) -> Iterable[int]:
    """Numbers of a rank's windows; equally many on all ranks, so that the last ones may be past the end."""
    return range(ranks.rank, math.ceil(count / ranks.size) * ranks.size, ranks.size)


def _window_sums(logits: Tensor, expected: Tensor | None, ids: Tensor) -> Tensor:
    """Return the four sums of `WindowLosses` for one window, (4,).

    Args:
        logits: The model's, (T, V).
        expected: The teacher's, (T, V), or None.
        ids: Token ids, (T,).
    """
    sums = torch.zeros(4, dtype=torch.float64, device=ids.device)
    for part in parts(len(ids) - 1, logits.shape[-1]):
        following = ids[part.start + 1 : part.stop + 1, None]
        log_p = logits[part].float().log_softmax(-1)
        sums[1] -= log_p.gather(1, following).double().sum()
        sums[3] += len(following)
        if expected is not None:
            wanted = expected[part].float().log_softmax(-1)
            sums[0] += (
                torch.nn.functional.kl_div(log_p, wanted, reduction="none", log_target=True).sum(-1).double().sum()
            )
            sums[2] -= wanted.gather(1, following).double().sum()
    return sums
