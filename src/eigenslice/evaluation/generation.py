"""How models write: repetition, what the first model thinks of it, and how long both write the same.

A sliced model can have a good perplexity and write badly: perplexity asks for one token after text of people, and a
model that writes goes on from its own tokens. All figures are over the written tokens, with the token that ends a text
and without the prompts:

- Repeated 4-grams: 1 - (different 4-grams) / (4-grams), each text by itself (seq-rep-4, arXiv 1908.04319). Over all
  texts of a model, 4-grams are summed before they are divided.
- The first model's perplexity of sampled text: exp of the mean negative log-likelihood of a written token, after its
  prompt. The text is drawn at temperature 1. Greedy text would mislead: a text that goes round in circles is easy to
  predict. The first model's own text gives what a text of its own kind has.
- Agreement: number of tokens before the greedy texts of a model and of the first model differ; if they never differ,
  the tokens of the shorter one.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import locate
from eigenslice.data.own_text import Drawn
from eigenslice.data.prompts import load_prompts
from eigenslice.errors import ActivationError, CheckpointError
from eigenslice.evaluation.continuation import Writer
from eigenslice.evaluation.perplexity import LARGEST_LOSS
from eigenslice.options.generating import GenerationOptions

N = 4
"""Tokens of an n-gram."""
TEMPERATURE = 1.0
STAGE = "writing"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Text:
    """What a model wrote after a prompt, as lists of token ids."""

    prompt: list[int]
    greedy: list[int]
    sampled: list[int]

    def mapped(self, ids: Callable[[list[int]], list[int]]) -> "Text":
        """The same text in the ids of another vocabulary."""
        return Text(ids(self.prompt), ids(self.greedy), ids(self.sampled))


def evaluate_generation(
    models: list[str], options: GenerationOptions, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """Let models write after prompts and measure what they write; every value is JSON.

    One model is in memory at a time. The first model writes last, because it then reads the others' texts.

    Args:
        models: Folders, hub ids or .gguf files; the first one is the dense model.
        options: The options of the command.
        progress: Called as the work goes on.

    Returns:
        `settings`, `prompts` (number) and `models`, in the order of the command. Each model has `model`, `greedy` and
        `sampled`, `agreement` and `texts`. `greedy` and `sampled` have `tokens` and `repeated` (None if no text has 4
        tokens); `sampled` also has `dense_perplexity`, by the first model. `agreement` has `mean` and `median` in
        tokens, None for the first model. `texts` has `prompt`, `greedy` and `sampled`, in words.

    Raises:
        CalibrationError: prompts that can't be read.
        CheckpointError: a model or tokenizer can't be loaded, or a model has tokens that the first one doesn't have.
        OptionsError: a model takes fewer tokens.
        ActivationError: a prediction is NaN, or the loss is too large.
    """
    prompts = load_prompts(options.text, options.prompts)
    for name in models:
        locate(name, adapters=True)  # the last one is refused before the first one is run
    total = len(models) * len(prompts)
    written: dict[int, list[Text]] = {}
    tokenizers: dict[int, Any] = {}
    dense = None
    for place in [*range(1, len(models)), 0]:
        dense = None  # no model but the next one is in memory
        loaded = load_model(models[place], options.device, options.dtype, options.trust_remote_code)
        dense, tokenizers[place] = loaded.model, loaded.tokenizer()
        writer = Writer(models[place], loaded.model, tokenizers[place], options.new, "lower --prompt-tokens")
        before = (len(written)) * len(prompts)
        written[place] = []
        for text in write(writer, prompts, options):
            progress(STAGE, before + len(written[place]), total)
            written[place].append(text)
    rows = []
    for place, name in enumerate(models):
        ids = _same_ids(name, tokenizers[place], models[0], tokenizers[0])
        texts = [text.mapped(ids) for text in written[place]]
        measured = figures(texts, written[0] if place else None, dense)
        rows.append({"model": name} | measured | {"texts": _words(written[place], tokenizers[place])})
    progress(STAGE, total, total)
    settings = options.model_dump(mode="json", exclude={"text": {"samples", "seqlen", "seed"}})
    return {"settings": settings, "prompts": len(prompts), "models": rows}


def write(writer: Writer, prompts: list[str], options: GenerationOptions) -> Iterator[Text]:
    """Let a model write greedily, and at temperature 1, after each prompt.

    Each prompt has a seed of its own, so that all models draw with the same random numbers.
    """
    seeds = torch.randint(2**62, (len(prompts),), generator=torch.Generator().manual_seed(options.seed)).tolist()
    for prompt, seed in zip(prompts, seeds, strict=True):
        ids = writer.prompt_ids(prompt, options.prompt_tokens)
        drawn = Drawn(TEMPERATURE, torch.Generator().manual_seed(seed))
        yield Text(*(part.tolist() for part in (ids[0], writer.go_on(ids), writer.go_on(ids, drawn))))


def figures(texts: list[Text], own: list[Text] | None, dense: Any) -> dict[str, Any]:
    """A model's figures: `greedy`, `sampled` and `agreement`, as `evaluate_generation` describes them.

    Args:
        texts: What the model wrote, in the dense model's ids.
        own: What the dense model wrote after the same prompts; None if it is the same model.
        dense: The dense model.
    """
    greedy, sampled = ([getattr(text, kind) for text in texts] for kind in ("greedy", "sampled"))
    agreed = [agreement(a.greedy, b.greedy) for a, b in zip(texts, texts if own is None else own, strict=True)]
    seen = perplexity_of([(text.prompt, text.sampled) for text in texts], dense)
    return {
        "greedy": {"tokens": sum(map(len, greedy)), "repeated": repeated_ngrams(greedy)},
        "sampled": {"tokens": sum(map(len, sampled)), "repeated": repeated_ngrams(sampled), "dense_perplexity": seen},
        "agreement": None if own is None else {"mean": statistics.fmean(agreed), "median": statistics.median(agreed)},
    }


def repeated_ngrams(texts: Sequence[Sequence[int]], n: int = N) -> float | None:
    """Share of n-grams that were in the same text before, of all n-grams of all texts; None if there is none."""
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    count = sum(map(len, grams))
    return 1 - sum(len(set(of_text)) for of_text in grams) / count if count else None


def agreement(text: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens before two texts differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def perplexity_of(texts: list[tuple[list[int], list[int]]], model: Any) -> float:
    """exp of a model's mean negative log-likelihood of written tokens, given the prompts; texts are (prompt, written).

    Raises:
        ActivationError: the loss is NaN or too large.
    """
    total, tokens = 0.0, 0
    for prompt, written in texts:
        ids = torch.tensor([prompt + written], device=model.device)
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="none")
        total, tokens = total + float(losses.double().sum()), tokens + len(written)
    loss = total / tokens
    if not loss < LARGEST_LOSS:
        raise ActivationError(
            f"the loss of written text is {loss}",
            allowed=f"a loss below {LARGEST_LOSS} nats per token, so that its exponential is a number",
            next_step="check the models' weights, or run with --dtype float32",
        )
    return math.exp(loss)


def _same_ids(name: str, tokenizer: Any, first: str, own: Any) -> Callable[[list[int]], list[int]]:
    """A function from a model's token ids to the first model's ids of the same tokens.

    A model with fewer tokens has other ids (`slice --vocabulary`).
    """
    if tokenizer.get_vocab() == own.get_vocab():
        return list
    known = own.get_vocab()

    def mapped(ids: list[int]) -> list[int]:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        unknown = next((token for token in tokens if token not in known), None)
        if unknown is not None or None in tokens:
            raise CheckpointError(
                f"{name} writes the token {unknown!r}, which {first} doesn't have",
                allowed="models with the first model's tokens, or some of them",
                next_step=f"name the model first that {name} was made from",
            )
        return [known[token] for token in tokens]

    return mapped


def _words(texts: list[Text], tokenizer: Any) -> list[dict[str, str]]:
    """Texts as they read."""
    kinds = ("prompt", "greedy", "sampled")
    return [{kind: tokenizer.decode(getattr(text, kind), skip_special_tokens=True) for kind in kinds} for text in texts]
