"""Sequences of tokens, to calibrate on or to measure a perplexity on."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenslice.data.batches import Batch
from eigenslice.data.ids import DEFAULT_TENSOR, longest_sequence, read_token_ids
from eigenslice.data.sources import Source, sources
from eigenslice.data.templates import ChatTemplate
from eigenslice.data.texts import Chat, Documents, Purpose, load_documents
from eigenslice.errors import CalibrationError, EigensliceWarning, first_line, printable
from eigenslice.options.calibration_text import CalibrationOptions

CHARACTERS_PER_TOKEN = 12  # generous for English, so that enough text is read from large data sets
BATCH_TOKENS = 2048  # a forward pass of more tokens isn't faster, and takes more memory
PLAIN = (
    "its conversations are written as plain text, one message below the other, as the tokenizer has no chat template."
)
PARTS = 4  # groups that a single text is cut into


@dataclass(frozen=True)
class Tokens:
    """Sequences and their description, which goes into the manifest.

    Attributes:
        batches: Sequences of equal length together, in their order.
        description: Source, number of sequences and tokens.
    """

    batches: list[Batch]
    description: dict[str, Any]

    @property
    def count(self) -> int:
        """Tokens that count: no padding."""
        return sum(batch.tokens for batch in self.batches)

    def with_rows(self, rows: Tensor, group: int, name: str, *, own: bool = False) -> "Tokens":
        """These, and rows (count, T) of another group; the description has their number under the name."""
        batches = [Batch(part, group=group, own=own) for part in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))]
        return Tokens([*self.batches, *batches], self.description | {name: len(rows)})

    @property
    def sha256(self) -> str:
        """SHA-256 of all token ids, masks and groups, in their order."""
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(f"{tuple(batch.input_ids.shape)} {batch.group}".encode())
            for tensor in (batch.input_ids, batch.attention_mask):
                digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def calibration_tokens(
    options: CalibrationOptions, tokenizer: Callable[[], Any], config: Any, chat: bool | None = None
) -> Tokens:
    """Return calibration tokens: random windows of one text or several, or token ids as they are.

    Several texts take turns, so that each prefix has equal shares. With texts a, b, c the windows are a0 b0 c0 a1 b1 c1
    ... If a text ends too soon, the others go on in turns.

    Args:
        options: The calibration options.
        tokenizer: Function that gives the model's tokenizer; only called for texts.
        config: The dense model's config: vocabulary, longest sequence, width.
        chat: Use of the tokenizer's chat template. None uses it for conversations without a text of their own, True for
            all conversations, False never.

    Raises:
        CalibrationError: no tokens, token ids that the model can't take, or texts that can't be mixed.
        CheckpointError: texts, but no tokenizer.
    """
    tokens = _tokens(options, sources(options), tokenizer, config, "calibration", chat)
    if tokens.count < 4 * config.hidden_size:
        warnings.warn(
            f"{tokens.count} calibration tokens are few for a width of {config.hidden_size}: with fewer than "
            f"{4 * config.hidden_size}, the principal components follow chance. Raise --samples or --seqlen, or "
            "pass more text.",
            EigensliceWarning,
            stacklevel=2,
        )
    return tokens


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """Return ids of all tokens that the tokenizer and the embedding have, (n,), without special tokens."""
    special = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(min(vocabulary, len(tokenizer))) if i not in special])


def evaluation_tokens(options: CalibrationOptions, tokenizer: Callable[[], Any], config: Any) -> Tokens:
    """Tokens to measure a perplexity on: the first windows of one text, in order; raises as calibration_tokens."""
    chosen = sources(options)
    if len(chosen) > 1:
        raise CalibrationError(
            f"{len(chosen)} texts to measure one perplexity on: {', '.join(source.data for source in chosen)}",
            allowed="one text; a perplexity over several hides what each is like",
            next_step="measure them one by one (eigenslice eval takes --data several times)",
        )
    return _tokens(options, chosen, tokenizer, config, "evaluation")


def _tokens(
    options: CalibrationOptions,
    chosen: list[Source],
    tokenizer: Callable[[], Any],
    config: Any,
    purpose: Purpose,
    chat: bool | None = None,
) -> Tokens:
    ids = chosen[0].token_ids
    if ids:
        return _token_ids(ids, chosen[0].field or DEFAULT_TENSOR, config)
    length = options.seqlen
    longest = longest_sequence(config)
    if longest and length > longest:
        warnings.warn(
            f"--seqlen {length} is more than the model's {longest} positions; using {longest}.",
            EigensliceWarning,
            stacklevel=3,
        )
        length = longest
    if options.samples < len(chosen):
        raise CalibrationError(
            f"--samples {options.samples} for {len(chosen)} texts: {', '.join(source.data for source in chosen)}",
            allowed="at least one sequence of each text",
            next_step=f"raise --samples, best to a multiple of {len(chosen)}, or pass fewer texts",
        )
    share, more = divmod(options.samples, len(chosen))
    reading = _Reading(tokenizer, config, purpose, chat, length, options.seed)
    texts = [_windows(source, share + (number < more), reading) for number, source in enumerate(chosen)]
    order = _in_turns([len(windows) for windows, _ in texts], options.samples)
    taken = [texts[text][0][number] for text, number in order]
    described = [(description, sum(text == t for t, _ in order)) for text, (_, description) in enumerate(texts)]
    description = {
        "data": described[0][0] if len(described) == 1 else [{"data": d, "sequences": n} for d, n in described],
        "sequences": len(taken),
        "seqlen": length,
        "tokens": sum(map(len, taken)),
        "seed": options.seed,
    }
    return Tokens(_batches(taken, _groups([text for text, _ in order])), description)


def _in_turns(lengths: list[int], count: int) -> list[tuple[int, int]]:
    """The first `count` places (text, number) when texts of these lengths take turns until all have ended."""
    rounds = range(max(lengths))
    return [(text, number) for number in rounds for text, n in enumerate(lengths) if number < n][:count]


@dataclass(frozen=True)
class _Reading:
    """The way in which texts become windows.

    Attributes:
        tokenizer: Function that gives the tokenizer.
        config: The model's config.
        purpose: Windows of calibration texts are shuffled; those of evaluation texts stay in order.
        chat: Whether conversations are expected (True) or refused (False).
        length: Tokens of a window.
        seed: Seed of the sampling.
    """

    tokenizer: Callable[[], Any]
    config: Any
    purpose: Purpose
    chat: bool | None
    length: int
    seed: int


def _windows(source: Source, wanted: int, reading: _Reading) -> tuple[list[Tensor], str]:
    """Return all windows of a text, and the text's description; warn if there are too few windows."""
    length, purpose = reading.length, reading.purpose
    enough = length * (wanted + (purpose == "evaluation"))  # where a text is cut, its last tokens may be others
    ids, documents = _encoded(source, enough, reading)
    for note in documents.notes:
        warnings.warn(printable(note), EigensliceWarning, stacklevel=4)
    windows = list(ids.split(length))
    if len(windows) > 1 and len(windows[-1]) < length and (len(windows) > wanted or len(windows[-1]) < 2):
        windows.pop()
    if len(windows[0]) < 2:
        raise CalibrationError(
            f"{source.data} holds {len(ids)} tokens",
            allowed="at least 2 tokens, better 4 times the model's width",
            next_step="pass more text",
        )
    if len(windows) < wanted and purpose == "calibration":
        warnings.warn(
            f"{source.data} holds only {len(windows)} sequences of {length} tokens; {wanted} were asked for.",
            EigensliceWarning,
            stacklevel=4,
        )
    if purpose == "calibration":
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(reading.seed)).tolist()
        windows = [windows[i] for i in order]
    return windows, documents.description


def _encoded(source: Source, enough: int, reading: _Reading) -> tuple[Tensor, Documents]:
    """Return token ids of a text, at least so many if the text is long enough, and the text's description."""
    tokenizer, chat = reading.tokenizer(), reading.chat
    characters = enough * CHARACTERS_PER_TOKEN
    has_template = bool(getattr(tokenizer, "chat_template", None)) and chat is not False
    with ChatTemplate(tokenizer) as template:
        written = Chat(template, True, first=bool(chat)) if has_template else Chat(note="" if chat is False else PLAIN)
        while True:
            documents = load_documents(source.data, source.field, reading.purpose, characters, reading.seed, written)
            ids = _ids(tokenizer, documents, source.data, reading.config)
            if not documents.more or len(ids) >= enough:
                return ids, documents
            characters *= 4


def _ids(tokenizer: Any, documents: Documents, data: str, config: Any) -> Tensor:
    """Token ids of the documents as one text, (n,)."""
    text = documents.separator.join(documents.texts)
    try:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].long()
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    except Exception as error:  # tokenizers raise their own
        raise CalibrationError(
            f"the tokenizer can't read {data} ({first_line(error)})",
            allowed="text that the model's own tokenizer takes",
            next_step="check that the tokenizer files in the folder belong to the model, or pass token ids",
        ) from error
    if low < 0 or high >= config.vocab_size:
        raise CalibrationError(
            f"the tokenizer gives token id {high if low >= 0 else low}; the model's vocabulary has {config.vocab_size}",
            allowed="the model's own tokenizer",
            next_step="check that the tokenizer files in the folder belong to the model",
        )
    return ids


def _groups(texts: list[int]) -> list[int]:
    """Group of each sequence: its text, or for a single text which quarter of the sequences it is in."""
    return texts if len(set(texts)) > 1 else [PARTS * number // len(texts) for number in range(len(texts))]


def _batches(windows: list[Tensor], groups: list[int]) -> list[Batch]:
    """Put neighbours of equal length and the same group together."""
    batches: list[Batch] = []
    for (length, group), neighbours in groupby(
        zip(windows, groups, strict=True), key=lambda pair: (len(pair[0]), pair[1])
    ):
        rows = torch.stack([window for window, _ in neighbours])
        batches += [Batch(part, group=group) for part in rows.split(max(1, BATCH_TOKENS // length))]
    return batches


def _token_ids(path: Path, name: str, config: Any) -> Tokens:
    ids, mask = read_token_ids(path, name, config)
    groups = torch.tensor(_groups([0] * len(ids)))
    batches: list[Batch] = []
    for group in groups.unique().tolist():
        for rows in (groups == group).nonzero()[:, 0].split(max(1, BATCH_TOKENS // ids.shape[1])):
            batches.append(Batch(ids[rows], None if mask is None else mask[rows], group))
    tokens = Tokens(batches, {})
    description = {
        "data": f"{path.name}, tensor {name!r}",
        "sequences": ids.shape[0],
        "seqlen": ids.shape[1],
        "tokens": tokens.count,
    }
    return Tokens(batches, description)
