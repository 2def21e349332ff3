"""The check that an exported file computes the same as transformers, on a few prompts, in the file's own runtime.

For each prefix of each prompt, the runtime's most likely next tokens are compared with transformers. The measures are
the difference of their log-probabilities, in nats, and the agreement on the most likely token.

Files with fewer bits are compared twice. The file must agree within a tolerance with transformers on the *rounded*
weights. There, only the runtime's arithmetic differs, so an error in the conversion would show. The difference from the
original model is the cost of rounding, and has no limit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eigenslice.errors import ActivationError, ExportError

LIKELY = 10
"""Tokens compared at each position."""
LENGTH = 16
"""Tokens of a prompt that are used."""
TEXTS = (
    "The capital of France is Paris. In 1789, the people of",
    "def add(a, b):\n    return a + b\n\nprint(add(12, 345))",
    "Die Stra\u00dfe f\u00fchrt nach M\u00fcnchen; \u6211\u60f3\u5728 apple \u5de5\u4f5c. I've",
    "Water boils at 100 degrees.   It's\n\n hot, isn't it?",
)
"""Prompts: prose, code, other languages and scripts, numbers and odd spaces, so that splitting text is tested, too."""


class Runtime(Protocol):
    """A file, loaded by its runtime."""

    def next_tokens(self, ids: Sequence[int], likely: int) -> dict[int, float]:
        """Log-probabilities (nats) of the `likely` most likely tokens after these; the most likely one first."""
        ...


@dataclass(frozen=True)
class Agreement:
    """The agreement of a runtime with transformers.

    Attributes:
        positions: Positions compared.
        max_difference: Largest difference of log-probability (nats) of the likeliest tokens.
        mean_difference: Mean of these differences.
        top1: Share of positions with the same most likely token.
    """

    positions: int
    max_difference: float
    mean_difference: float
    top1: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """In one line, for people."""
        return (
            f"log-probabilities differ by {self.mean_difference:.5f} nats (largest {self.max_difference:.4f}), same "
            f"most likely token at {100 * self.top1:.0f} % of {self.positions} positions"
        )


def prompts(tokenizer: Callable[[str], Any]) -> list[list[int]]:
    """Token ids of the prompts."""
    return [ids[:LENGTH] for ids in (tokenizer(text)["input_ids"] for text in TEXTS)]


def check_tokens(tokenizer: Callable[[str], Any], tokenize: Callable[[str], list[int]]) -> None:
    """Compare the runtime's tokenizer with transformers'.

    Raises:
        ExportError: they disagree.
    """
    for text in TEXTS:
        expected, actual = list(tokenizer(text)["input_ids"]), tokenize(text)
        if actual != expected:
            raise ExportError(
                f"the runtime's tokenizer gives {actual} for {text!r}, transformers' gives {expected}",
                allowed="the same tokens",
                next_step="name how text is split with --tokenizer-pre, as in a GGUF of the dense model",
            )


def reference(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    """transformers' log-probabilities, (tokens, vocabulary) in float64, for each sequence.

    Raises:
        ActivationError: the model gives NaN, so that there is nothing to compare with.
    """
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([ids], device=model.device)).logits[0].double().log_softmax(-1).cpu()
            for ids in sequences
        ]
    if any(bool(rows.isnan().any()) for rows in logits):
        raise ActivationError(
            "the model gives NaN in float32, so the exported file can't be checked",
            allowed="a model that gives numbers",
            next_step="nothing was written; measure the model with `eigenslice eval`",
        )
    return logits


def compare(runtime: Runtime, sequences: list[list[int]], expected: Sequence[list[Tensor]]) -> list[Agreement]:
    """Run each prefix of each sequence once and compare it with several references of `reference`."""
    differences: list[list[Tensor]] = [[] for _ in expected]
    same = [0] * len(expected)
    for number, ids in enumerate(sequences):
        for last in range(len(ids)):
            next_tokens = runtime.next_tokens(ids[: last + 1], LIKELY)
            tokens = torch.tensor(list(next_tokens))
            values = torch.tensor(list(next_tokens.values()), dtype=torch.float64)
            for which, rows in enumerate(expected):
                row = rows[number][last]
                differences[which].append((values - row[tokens]).abs())
                same[which] += int(tokens[0]) == int(row.argmax())
    return [
        Agreement(len(parts), float(torch.cat(parts).max()), float(torch.cat(parts).mean()), hits / len(parts))
        for parts, hits in zip(differences, same, strict=True)
    ]


def require_agreement(agreement: Agreement, tolerance: float, runtime: str) -> None:
    """Refuse a file that computes something else.

    Raises:
        ExportError: the mean difference is above the tolerance, or no number.
    """
    if not (agreement.mean_difference <= tolerance and math.isfinite(agreement.max_difference)):
        raise ExportError(
            f"{runtime} disagrees with transformers: log-probabilities differ by {agreement.mean_difference:.4f} nats "
            f"(largest {agreement.max_difference:.4f}), the most likely token is the same at "
            f"{100 * agreement.top1:.0f} % of {agreement.positions} positions",
            allowed=f"a mean difference of at most {tolerance} nats for this type",
            next_step="nothing was written; export another --type, and report this with the model's config.json",
        )
