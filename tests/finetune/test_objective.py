"""The objective against its formula in float64."""

import pytest
import torch

from eigenslice.finetune import objective
from eigenslice.finetune.objective import IGNORED, shifted_targets, summed_loss


def test_targets_are_the_next_tokens() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert shifted_targets(ids).tolist() == [[6, 7, IGNORED], [9, 0, IGNORED]]
    assert shifted_targets(ids, mask).tolist() == [[6, 7, IGNORED], [9, IGNORED, IGNORED]]


@pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])
def test_loss_and_gradient(distill: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "LOGITS", 3 * 11)  # several parts, the last one shorter
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 5, 11, generator=generator)
    targets = torch.randint(0, 11, (2, 5), generator=generator)
    targets[0, 4] = targets[1, 2] = IGNORED

    def formula(logits: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(2):
            for position in range(5):
                if targets[row, position] == IGNORED:
                    continue
                p = logits[row, position].double().softmax(-1)
                q = teacher[row, position].double().softmax(-1)
                kl = (q * (q.log() - p.log())).sum()
                total = total + distill * kl - (1 - distill) * p[targets[row, position]].log()
        return total

    expected = formula(logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    actual = summed_loss(logits, targets, teacher, distill)
    (actual_gradient,) = torch.autograd.grad(actual, logits)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_the_next_tokens_loss_is_transformers_own(dense_folder) -> None:
    from tests import tiny
    from tests.results import load

    model, ids = load(dense_folder("llama")), tiny.random_ids(2, 9)
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    targets = shifted_targets(ids)
    torch.testing.assert_close(summed_loss(output.logits, targets, None, 0.0) / 16, output.loss)
