"""Windows of text to train on, and windows that are held out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from eigenslice.data import Tokens, calibration_tokens
from eigenslice.data.own_text import SAMPLING_STAGE, write_rows
from eigenslice.errors import CalibrationError
from eigenslice.finetune.held_out import OWN_TEXT, HeldOut
from eigenslice.finetune.training import Progress
from eigenslice.options.finetuning import HELD_OUT, FinetuneOptions
from eigenslice.runtime.ranks import Ranks
from eigenslice.runtime.run_state import RunState

FEW = 8
"""At most one window in so many is held out by default."""


@dataclass(frozen=True)
class Windows:
    """The windows of a training.

    Attributes:
        tokens: All windows of texts, as they go into the manifest.
        train: Windows to train on, (T,) each.
        held_out: Windows to measure on.
        own: Number of windows among both that the teacher wrote.
    """

    tokens: Tokens
    train: list[Tensor]
    held_out: HeldOut
    own: int = 0


def text_windows(options: FinetuneOptions, tokenizer: Callable[[], Any], config: Any) -> Windows:
    """Return windows of the texts; the last windows of each text are held out, in turns.

    Args:
        options: The options of the command.
        tokenizer: Function that gives the model's tokenizer.
        config: The model's config.

    Raises:
        CalibrationError: there are too few windows.
    """
    wanted = options.data.model_copy(update={"samples": options.text_windows + (options.held_out or HELD_OUT)})
    tokens = calibration_tokens(wanted, tokenizer, config, options.chat)
    texts: dict[str, list[Tensor]] = {}
    for batch in tokens.batches:
        masks = [None] * len(batch.input_ids) if batch.attention_mask is None else batch.attention_mask.bool()
        rows = [row if mask is None else row[mask] for row, mask in zip(batch.input_ids, masks, strict=True)]
        texts.setdefault(_name(tokens, batch.group), []).extend(row for row in rows if len(row) > 1)
    count = sum(map(len, texts.values()))
    wanted_out = min(HELD_OUT, max(1, count // FEW)) if options.held_out is None else options.held_out
    if count <= wanted_out:
        raise CalibrationError(
            f"{count} windows of text, of which {wanted_out} are to be held out",
            allowed="more windows than --held-out",
            next_step="pass more text, or lower --held-out or --seqlen",
        )
    turns = [place for places in zip_longest(*map(_backwards, texts.items())) for place in places if place is not None]
    last = turns[:wanted_out]
    held_out = HeldOut([texts[name][number] for name, number in last], [name for name, _ in last])
    train = [
        (number, row) for name, rows in texts.items() for number, row in enumerate(rows) if (name, number) not in last
    ]
    return Windows(tokens, [row for _, row in sorted(train, key=lambda pair: pair[0])], held_out)


def add_own_windows(
    windows: Windows,
    options: FinetuneOptions,
    teacher: Any,
    tokenizer: Callable[[], Any],
    state: RunState,
    ranks: Ranks,
    progress: Progress,
) -> Windows:
    """Add windows that the teacher writes, to both kinds; the option is their share of the texts' windows.

    Token ids of the user's are used as they are.

    Args:
        windows: Windows of texts.
        options: The options of the command.
        teacher: The dense model.
        tokenizer: Function that gives its tokenizer.
        state: The saved state, which keeps the windows for an interrupted run.
        ranks: The processes. The first one writes the windows for all. Where the teacher is shared, all of them write
            the same windows, and those of the first one are taken.
        progress: Called as the windows grow.
    """
    description = windows.tokens.description
    if not options.own_share or "seed" not in description:
        return windows
    train, judge = (math.ceil(options.own_share * len(w)) for w in (windows.train, windows.held_out.windows))
    saved = state.result(SAMPLING_STAGE)
    if saved is None:

        def without_tokens(stage: str, done: int, total: int, tokens: int = 0) -> None:
            progress(stage, done, total)

        def write() -> list[list[int]]:
            seed = options.data.seed + 1  # not the text that the model was sliced on
            rows = write_rows(teacher, tokenizer(), train + judge, description["seqlen"], seed, without_tokens)
            return rows.tolist()

        written = None if options.place == "device" else write()
        ids = torch.tensor(ranks.on_first(write if written is None else lambda: written), dtype=torch.long)
        state.finish(SAMPLING_STAGE, {"ids": ids}, {})
    else:
        ids = saved[0]["ids"]
    rows, held_out = list(ids), windows.held_out
    return replace(
        windows,
        train=[*windows.train, *rows[:train]],
        held_out=HeldOut([*held_out.windows, *rows[train:]], [*held_out.groups, *[OWN_TEXT] * judge]),
        own=train + judge,
    )


def _name(tokens: Tokens, group: int) -> str:
    """Name of the text that a group belongs to; of a single text, groups are parts."""
    data = tokens.description["data"]
    return data if isinstance(data, str) else data[group]["data"]


def _backwards(text: tuple[str, list[Tensor]]) -> list[tuple[str, int]]:
    """Return the places of a text's windows, the last one first."""
    name, rows = text
    return [(name, number) for number in reversed(range(len(rows)))]
