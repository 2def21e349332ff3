"""Perplexity: exp of the mean negative log-likelihood per predicted token.

Tokens 2 to T of a window are predicted from the tokens before them in the window. The mean is over all predicted tokens
of all windows, so a short last window counts by its tokens. End-of-text tokens count, padding doesn't.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eigenslice.algebra.finite import LARGEST_EXPONENT
from eigenslice.checkpoint.loading import load_model
from eigenslice.data import evaluation_tokens
from eigenslice.data.batches import Batch
from eigenslice.errors import ActivationError, CalibrationError
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.common import DtypeName
from eigenslice.runtime.out_of_memory import memory_errors

LARGEST_LOSS = LARGEST_EXPONENT
"""Largest loss with a perplexity, in nats per token."""
ADVICE = "a shorter --seqlen takes less memory, and so do weights by --dtype bfloat16; fewer --samples take no less"
"""What to change where memory has run out."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its text.

    Attributes:
        perplexity: exp(loss).
        loss: Mean negative log-likelihood in nats per predicted token.
        tokens: Number of predicted tokens.
        data: The description of the text.
    """

    perplexity: float
    loss: float
    tokens: int
    data: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def negative_log_likelihood(model: Any, batch: Batch) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of tokens predicted.

    One sequence at a time, so that the logits of a large vocabulary fit.
    """
    total, tokens = 0.0, 0
    for row in range(batch.input_ids.shape[0]):
        logits, targets = predictions(model, batch, row)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        total += float(losses.double().sum())
        tokens += losses.numel()
    return total, tokens


def predictions(model: Any, batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, V) of one sequence for its P predicted tokens, in the model's dtype, and these tokens (P,).

    Token t is predicted where it and the one before it aren't padding.
    """
    ids = batch.input_ids[row : row + 1].to(model.device)
    mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1].to(model.device)
    kwargs = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits[0, :-1]
    if mask is None:
        return logits, ids[0, 1:]
    counts = batch.predicted[row].to(model.device)
    return logits[counts], ids[0, 1:][counts]


def perplexity(
    model: Any,
    batches: list[Batch],
    data: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Perplexity:
    """Measure a model on windows of tokens.

    Raises:
        ActivationError: the loss is NaN or too large.
        CalibrationError: there is no token to predict.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            progress("evaluating", number, len(batches))
            loss, count = negative_log_likelihood(model, batch)
            total, tokens = total + loss, tokens + count
    if not tokens:
        raise CalibrationError(
            "no token can be predicted: the mask leaves no two neighbours",
            allowed="sequences with at least 2 tokens that are not padding",
            next_step="check the attention_mask beside the token ids",
        )
    return of_loss(total / tokens, tokens, data)


def of_loss(loss: float, tokens: int, data: dict[str, Any] | None = None) -> Perplexity:
    """Return the perplexity of a mean loss in nats per token.

    Raises:
        ActivationError: the loss is NaN or too large.
    """
    if not loss < LARGEST_LOSS:
        raise ActivationError(
            f"the loss is {loss}",
            allowed=f"a loss below {LARGEST_LOSS} nats per token, so that its exponential is a number",
            next_step="check the model's weights, or run with --dtype float32",
        )
    return Perplexity(math.exp(loss), loss, tokens, data or {})


def evaluate(
    name: str,
    data: CalibrationOptions,
    device: str | None = None,
    dtype: DtypeName | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Perplexity:
    """Perplexity of a folder, a hub id or a .gguf file; arguments as `load_model`'s and `perplexity`'s."""
    return evaluate_each(name, [data], device, dtype, trust_remote_code, progress)[0]


def evaluate_each(
    name: str,
    texts: Iterable[CalibrationOptions],
    device: str | None = None,
    dtype: DtypeName | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Perplexity]:
    """A perplexity for each text, in their order; the model is loaded once. Arguments as `evaluate`'s."""
    with memory_errors(progress, lambda stage: ADVICE) as watched:
        loaded = load_model(name, device, dtype, trust_remote_code)
        config = loaded.model.config.get_text_config()
        tokens = [evaluation_tokens(text, loaded.tokenizer, config) for text in texts]
        return [perplexity(loaded.model, t.batches, t.description, watched) for t in tokens]
