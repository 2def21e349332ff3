"""Sequences beside the calibration texts: text of the model's own, random tokens and beginnings."""

import math
import warnings

import torch
from torch import Tensor

from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.placing import SHARE
from eigenslice.data import beginnings, random_sequences
from eigenslice.data.own_text import SAMPLING_STAGE as SAMPLING_STAGE
from eigenslice.data.own_text import write_rows
from eigenslice.data.tokens import Tokens
from eigenslice.errors import EigensliceWarning, OptionsError
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import OWN_SHARE, RANDOM_SHARE, SliceOptions
from eigenslice.runtime.device import give_memory_back
from eigenslice.runtime.offload import FREE_SHARE, free_bytes
from eigenslice.runtime.progress import Progress
from eigenslice.runtime.ranks import Ranks
from eigenslice.runtime.run_state import RunState
from eigenslice.slicing.memory import room_for_model, whole_bytes
from eigenslice.vocabulary import SourceOfKeptTokens, keep_rows


def add_sequences(
    tokens: Tokens,
    dense: DenseModel,
    options: SliceOptions,
    dtype: torch.dtype,
    state: RunState,
    ranks: Ranks,
    progress: Progress,
) -> Tokens:
    """Add text of the model's own or random tokens, and beginnings, to calibration texts, if anything will be fitted.

    Args:
        tokens: Calibration tokens. Token ids of the user's are used as they are.
        dense: The dense model.
        options: The shares of each kind.
        dtype: The dtype of the forward pass.
        state: The saved state, which keeps the model's own text.
        ranks: The processes that share the sequences.
        progress: Called as the model writes.

    Raises:
        OptionsError: text of the model's own was asked for, and there is no room for the model.
    """
    if not options.fits or "seed" not in tokens.description:  # token ids are used as they are
        return tokens
    more = add_own_text(tokens, dense, options, dtype, state, ranks, progress)
    share = options.random_tokens
    if share is None:
        share = RANDOM_SHARE if more is tokens else 0.0  # beside text of its own, they gain nothing
    tokenizer, vocabulary, seed = dense.source.tokenizer, dense.config.vocab_size, options.calibration.seed
    more = beginnings(more, tokenizer, vocabulary, seed)
    return random_sequences(more, tokenizer, vocabulary, share, seed)


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
        options: The number of sequences, as a share of the number of the texts' sequences.
        dtype: The dtype of the forward pass.
        state: The saved state, which keeps the text for an interrupted run.
        ranks: The processes that share the sequences. The first one writes the text for all.
        progress: Called as the text grows.

    Raises:
        OptionsError: text was asked for, and there is no room for the model.
    """
    share = OWN_SHARE if options.own_text is None else options.own_text
    count = math.ceil(share * tokens.description["sequences"])
    if not count:
        return tokens
    saved = state.result(SAMPLING_STAGE)
    if saved is None:
        written = ranks.on_first(lambda: _write_own(tokens, dense, options, dtype, count, progress).tolist())
        ids = torch.tensor(written, dtype=torch.long)
        state.finish(SAMPLING_STAGE, {"ids": ids}, {})
    else:
        ids = saved[0]["ids"]
    if not len(ids):
        return tokens
    return tokens.with_rows(ids, 1 + max(batch.group for batch in tokens.batches), "own_sequences", own=True)


def _write_own(
    tokens: Tokens, dense: DenseModel, options: SliceOptions, dtype: torch.dtype, count: int, progress: Progress
) -> Tensor:
    """Return sequences of about the texts' length, each of several short texts, (count, T); none without room."""
    if not _has_room(dense, options.own_text, dtype):
        return torch.empty(0, 0, dtype=torch.long)
    # Slicing runs transformers' own classes, so that this does, too: no code of the checkpoint
    model, tokenizer = load_model(options.model, dense.device, dtype).model, dense.source.tokenizer
    if isinstance(dense.source, SourceOfKeptTokens):
        keep_rows(model, dense.source.kept.ids)
    seed = options.calibration.seed
    ids = write_rows(model, tokenizer, count, int(tokens.description["seqlen"]), seed, progress)
    del model
    give_memory_back(dense.device)
    return ids


def _has_room(dense: DenseModel, share: float | None, dtype: torch.dtype) -> bool:
    """Return whether to load the model as a whole: if asked to, or if that leaves a good part of the memory free."""
    needed, free = whole_bytes(dense, dtype), free_bytes(dense.device)
    size = f"as a whole, the model takes {needed / 1e9:.1f} GB"
    if share is None:
        room = room_for_model(dense.device)
        if needed > room:
            warnings.warn(
                f"no text of the model's own to calibrate on: {size}, more than {100 * FREE_SHARE:.0f} % of the "
                f"{free / 1e9:.1f} GB that are free. --own-text {OWN_SHARE} lets it write, --own-text 0 does without "
                "and says nothing.",
                EigensliceWarning,
                stacklevel=2,
            )
        return needed <= room
    cuts_vocabulary = isinstance(dense.source, SourceOfKeptTokens)
    if cuts_vocabulary:  # rows are picked in one place only
        free = int(SHARE * free)
    elif dense.device.type == "cuda":  # what doesn't fit stays on the host
        free += free_bytes(torch.device("cpu"))
    if needed > free:
        raise OptionsError(
            f"--own-text {share}: {size}, and {free / 1e9:.1f} GB are free",
            allowed="a model that fits into memory" + " (on the GPU, if tokens are left out)" * cuts_vocabulary,
            next_step="pass --own-text 0; text that it wrote elsewhere (eigenslice sample) can be one --calibration",
        )
    return True
