"""Text that a model writes by itself: calibration text of the kinds that it was trained on.

A model's own training text is rarely at hand, and other text shows only a part of what it can do. What it samples at
temperature 1 from random beginnings is a sample of what it learnt (arXiv 2410.17170 calibrates on it, too).
"""

import json
import math
import warnings
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from eigenslice.checkpoint.durable import write_whole
from eigenslice.checkpoint.output import check_output
from eigenslice.data.tokens import Tokens, longest_sequence, ordinary_tokens
from eigenslice.dense import DenseModel
from eigenslice.device import trim_memory
from eigenslice.errors import EigensliceWarning, OptionsError
from eigenslice.estimate import room_for_model, whole_bytes
from eigenslice.evaluate import load_model
from eigenslice.offload import FREE_SHARE, free_bytes
from eigenslice.options import LONGEST, MOST_SAMPLES, OWN_SHARE, DtypeName, SliceOptions
from eigenslice.paths import UserPath, expanded
from eigenslice.progress import Progress, no_progress
from eigenslice.ranges import SEED, Limits, check_ranges
from eigenslice.ranks import Ranks
from eigenslice.resume import RunState

STAGE = "sampling"
OWN_LENGTH = 128
"""Tokens of a text beside calibration texts: many short ones show more kinds, and cost less, than a few long ones."""
OWN_BATCH = 64
"""Of them at once."""
MOST_TOKENS = 10**9
LIMITS: Limits = {
    "samples": (1, MOST_SAMPLES, f"1 to {MOST_SAMPLES} texts"),
    "seqlen": (2, LONGEST, f"2 to {LONGEST} tokens"),
    "batch": (1, 10**6, "1 to 1000000 texts"),
    "temperature": (1e-4, 1e4, "0.0001 to 10000; 1 is what the model is"),
    "seed": SEED,
}


class SampleOptions(BaseModel):
    """What to write.

    Attributes:
        model: A folder, a hub id or a .gguf file. It is loaded as a whole.
        output: A .json file, a list of strings, as `slice --calibration` takes it; must not exist.
        samples: Number of texts.
        seqlen: Tokens of each.
        batch: Texts at once.
        temperature: What logits are divided by; at 1, tokens are drawn as the model predicts them.
        seed: Of the beginnings and of the drawing.
        device: torch device; None is a GPU if there is one.
        dtype: None is the stored one on a GPU and float32 on CPU.
        trust_remote_code: Let the checkpoint run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: UserPath
    samples: int = 64
    seqlen: int = 1024
    batch: int = 32
    temperature: float = 1.0
    seed: int = 0
    device: str | None = None
    dtype: DtypeName | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "SampleOptions":
        check_ranges(self, LIMITS)
        if self.samples * self.seqlen > MOST_TOKENS:
            raise OptionsError(
                f"--samples {self.samples} --seqlen {self.seqlen}",
                allowed=f"at most {MOST_TOKENS} tokens together: they are held in memory",
                next_step="lower one of them",
            )
        if self.output.suffix != ".json":
            raise OptionsError(
                f"--output {self.output}", allowed="a .json file", next_step=f"write to {self.output}.json"
            )
        return self


class Drawn(LogitsProcessor):
    """Leaves one token, drawn from what a model predicts, so that the most likely one is that.

    It inverts the cumulative distribution, with one random number for each text. `do_sample` draws one for each token
    of the vocabulary, which takes a third of the time on CPU, and from the process's generator.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        """temperature: what logits are divided by. generator: of the CPU, so that all devices draw the same."""
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

    Each begins with what the tokenizer puts before any text and one random token. Where one ends, the model goes on
    with the next, as in its training.

    Args:
        options: What to write.
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
    ids = draw(
        loaded.model,
        tokenizer,
        options.samples,
        options.seqlen,
        options.batch,
        options.temperature,
        options.seed,
        progress,
    )
    texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    write_whole(options.output, json.dumps(texts, ensure_ascii=False, indent=0))
    return texts


def draw(
    model: Any,
    tokenizer: Any,
    samples: int,
    length: int,
    batch: int,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Tensor:
    """Token by token, as a model predicts them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        samples: Number of texts.
        length: Tokens of each, the random first one among them.
        batch: Texts at once.
        temperature: What logits are divided by.
        seed: Of the first tokens and of the drawing.
        progress: Called after each batch.

    Returns:
        Token ids, (samples, s + length), on the CPU: s is the number of tokens that the tokenizer puts before any text.
    """
    start = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    ordinary = ordinary_tokens(tokenizer, model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    first = ordinary[torch.randint(len(ordinary), (samples, 1), generator=generator)]
    prompts = torch.cat([start.expand(samples, -1), first], dim=1)
    # A config of its own: those of checkpoints cut the tail off and stop where a text ends
    sampling = GenerationConfig(max_length=len(start) + length, do_sample=False, pad_token_id=0)
    model.generation_config = sampling
    processors = LogitsProcessorList([Drawn(temperature, generator)])
    drawn: list[Tensor] = []
    for prompt in prompts.split(batch):
        progress(STAGE, sum(map(len, drawn)), samples)
        prompt = prompt.to(model.device)
        with torch.no_grad():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=sampling,
                logits_processor=processors,
            )
        drawn.append(ids.cpu())
    progress(STAGE, samples, samples)
    return torch.cat(drawn)


def add_own_text(
    tokens: Tokens,
    dense: DenseModel,
    options: SliceOptions,
    dtype: torch.dtype,
    state: RunState,
    ranks: Ranks,
    progress: Progress,
) -> Tokens:
    """Add sequences of text that the dense model writes itself; measured in benchmarks/EXPERIMENTS.md.

    For that, the model is loaded as a whole, once.

    Args:
        tokens: Calibration tokens of texts.
        dense: The model.
        options: How many sequences, as a share of those of the texts.
        dtype: Of the forward pass.
        state: Where to keep the text, so that an interrupted run goes on with the same.
        ranks: The first one writes for all.
        progress: Called as the text grows.

    Raises:
        OptionsError: text was asked for, and there is no room for the model.
    """
    share = OWN_SHARE if options.own_text is None else options.own_text
    count = math.ceil(share * tokens.description["sequences"])
    if not count:
        return tokens
    saved = state.result(STAGE)
    if saved is None:
        written = ranks.on_first(lambda: _write_own(tokens, dense, options, dtype, count, progress).tolist())
        ids = torch.tensor(written, dtype=torch.long)
        state.finish(STAGE, {"ids": ids}, {})
    else:
        ids = saved[0]["ids"]
    if not len(ids):
        return tokens
    return tokens.with_rows(ids, 1 + max(batch.group for batch in tokens.batches), "own_sequences")


def _write_own(
    tokens: Tokens, dense: DenseModel, options: SliceOptions, dtype: torch.dtype, count: int, progress: Progress
) -> Tensor:
    """So many sequences of about the texts' length, each of several short ones, (count, T); none without room."""
    if not _has_room(tokens, dense, options.own_text, dtype):
        return torch.empty(0, 0, dtype=torch.long)
    # Slicing runs transformers' own classes, so that this does, too: no code of the checkpoint
    model, tokenizer = load_model(options.model, str(dense.device), dtype).model, dense.source.tokenizer
    start, seqlen = len(tokenizer("")["input_ids"]), int(tokens.description["seqlen"])
    length = max(2, min(OWN_LENGTH, seqlen) - start)
    together = max(1, seqlen // (start + length))
    ids = draw(model, tokenizer, count * together, length, OWN_BATCH, 1.0, options.calibration.seed, progress)
    del model
    trim_memory()
    return ids.reshape(count, -1)


def _has_room(tokens: Tokens, dense: DenseModel, share: float | None, dtype: torch.dtype) -> bool:
    """Whether to load the model as a whole: asked to, or where that takes no more than the activations will.

    Models larger than that are sliced because they don't fit.
    """
    needed, free = whole_bytes(dense, dtype), free_bytes(dense.device)
    size = f"as a whole, the model takes {needed / 1e9:.1f} GB"
    if share is None:
        room = min(room_for_model(dense, tokens.count, dtype), FREE_SHARE * free)
        if needed > room:
            warnings.warn(
                f"no text of the model's own to calibrate on: {size}, more than slicing it. "
                f"--own-text {OWN_SHARE} lets it write, --own-text 0 does without and says nothing.",
                EigensliceWarning,
                stacklevel=2,
            )
        return needed <= room
    if needed > free:
        raise OptionsError(
            f"--own-text {share}: {size}, and {free / 1e9:.1f} GB are free",
            allowed="a model that fits into memory",
            next_step="pass --own-text 0; text that it wrote elsewhere (eigenslice sample) can be one --calibration",
        )
    return True
