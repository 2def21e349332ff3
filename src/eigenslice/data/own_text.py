"""Text that a model writes by itself: calibration text of the kinds that it was trained on.

A model's own training text is rarely at hand, and other text shows only a part of its abilities. Text that the model
samples at temperature 1 from random beginnings is a sample of its training (arXiv 2410.17170 calibrates on such text,
too).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from eigenslice.checkpoint.loading import load_model
from eigenslice.data.tokens import longest_sequence, ordinary_tokens
from eigenslice.errors import OptionsError
from eigenslice.options.paths import expanded
from eigenslice.options.sampling import SampleOptions
from eigenslice.runtime.device import device_of
from eigenslice.runtime.durable import write_whole
from eigenslice.runtime.output import check_output
from eigenslice.runtime.progress import Progress, no_progress

SAMPLING_STAGE = "sampling"
OWN_LENGTH = 128
"""Tokens of a text beside calibration texts. Many short texts show more kinds, and cost less, than a few long texts."""
OWN_BATCH = 64
"""Number of texts that are written at once."""


class Drawn(LogitsProcessor):
    """A logits processor that draws a token and makes it the most likely one.

    It inverts the cumulative distribution, with one random number for each text. `do_sample` draws a number for each
    token of the vocabulary. This takes a third of the time on CPU, and uses the process's generator.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        """Logits are divided by the temperature. The generator is the CPU's, so that all devices draw the same."""
        self._temperature, self._generator = temperature, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for the token that is drawn, minus infinity for the others.

        Args:
            input_ids: The texts so far, (B, T).
            scores: Logits of their next tokens, (B, vocabulary).
        """
        cumulative = (scores.float() / self._temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        point = torch.rand(len(scores), 1, generator=self._generator, dtype=torch.float64).to(scores.device)
        token = torch.searchsorted(cumulative, point * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, token.clamp_max(scores.shape[-1] - 1), 0.0)


def sample_text(options: SampleOptions, progress: Progress = no_progress) -> list[str]:
    """Let a model write texts into a file.

    Each text begins with the tokenizer's special tokens and one random token. Behind the end of a text the model goes
    on with the next text, as in its training.

    Args:
        options: The options of the command.
        progress: Called after each batch.

    Returns:
        The texts.

    Raises:
        OptionsError: longer than the model takes.
        CheckpointError: the model or its tokenizer can't be loaded.
        OutputError: the file exists, or can't be written.
    """
    check_output(options.output, inputs=[expanded(options.model)])
    loaded = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    tokenizer = loaded.tokenizer()
    start = len(tokenizer("")["input_ids"])
    longest = longest_sequence(loaded.model.config.get_text_config())
    if longest and start + options.seqlen > longest:
        raise OptionsError(
            f"--seqlen {options.seqlen}",
            allowed=f"at most {longest - start} tokens: {options.model} takes {longest}",
            next_step="lower it; more --samples make up for it",
        )
    drawing = Drawing(options.samples, options.seqlen, options.batch, options.temperature, options.seed)
    ids = draw(loaded.model, tokenizer, drawing, progress)
    texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    write_whole(options.output, json.dumps(texts, ensure_ascii=False, indent=0))
    return texts


@dataclass(frozen=True)
class Drawing:
    """Texts to draw from a model's predictions.

    Attributes:
        samples: Number of texts.
        length: Number of tokens of each text, with the random first token.
        batch: Number of texts at once.
        temperature: Divisor of the logits.
        seed: Seed of the first tokens and of the drawing.
    """

    samples: int
    length: int
    batch: int
    temperature: float = 1.0
    seed: int = 0


def draw(model: Any, tokenizer: Any, texts: Drawing, progress: Progress = no_progress) -> Tensor:
    """Draw texts token by token from a model's predictions.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Number and length of the texts.
        progress: Called after each batch.

    Returns:
        Token ids, (samples, s + length), on the CPU: the tokenizer puts s tokens before any text.
    """
    start = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    ordinary = ordinary_tokens(tokenizer, model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(texts.seed)
    first = ordinary[torch.randint(len(ordinary), (texts.samples, 1), generator=generator)]
    prompts = torch.cat([start.expand(texts.samples, -1), first], dim=1)
    # Not the checkpoint's generation config, which may cut the tail off and stop at the end of a text
    sampling = GenerationConfig(max_length=len(start) + texts.length, do_sample=False, pad_token_id=0)
    model.generation_config = sampling
    processors = LogitsProcessorList([Drawn(texts.temperature, generator)])
    drawn: list[Tensor] = []
    for prompt in prompts.split(texts.batch):
        progress(SAMPLING_STAGE, sum(map(len, drawn)), texts.samples)
        prompt = prompt.to(device_of(model))
        with torch.no_grad():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=sampling,
                logits_processor=processors,
            )
        drawn.append(ids.cpu())
    progress(SAMPLING_STAGE, texts.samples, texts.samples)
    return torch.cat(drawn)


def write_rows(
    model: Any, tokenizer: Any, count: int, length: int, seed: int, progress: Progress = no_progress
) -> Tensor:
    """Let a model write rows of about this length, each of several short texts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        count: Number of rows.
        length: Number of tokens of a row, at most.
        seed: Seed of the texts.
        progress: Called after each batch of texts.

    Returns:
        Token ids, (count, T), on the CPU.
    """
    start = len(tokenizer("")["input_ids"])
    each = max(2, min(OWN_LENGTH, length) - start)
    together = max(1, length // (start + each))
    return draw(model, tokenizer, Drawing(count * together, each, OWN_BATCH, seed=seed), progress).reshape(count, -1)
