"""Documents from presets, files and the hub."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eigenslice.data.builtin import language_reference, library_docstrings
from eigenslice.data.conversations import Render
from eigenslice.errors import CalibrationError

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class HubText:
    """A text data set on the hub, with the split for each purpose."""

    path: str
    config: str | None
    field: str
    calibration: str
    evaluation: str
    files: dict[str, str] | None = None
    revision: str | None = None
    stream: bool = False


PRESETS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    # The parquet branch that the hub derives: the data set itself is a script, which datasets no longer runs
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "sentence",
        "train",
        "test",
        revision="refs/convert/parquet",
    ),
    "c4": HubText(
        "allenai/c4",
        None,
        "text",
        "train",
        "validation",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        stream=True,
    ),
    "alpaca": HubText("tatsu-lab/alpaca", None, "text", "train[:90%]", "train[90%:]"),
    "fineweb-edu": HubText(
        "HuggingFaceFW/fineweb-edu",
        None,
        "text",
        "train",
        "validation",
        files={"train": "sample/10BT/000_00000.parquet", "validation": "sample/10BT/013_00000.parquet"},
        stream=True,
    ),
    "tinystories": HubText("roneneldan/TinyStories", None, "text", "train", "validation", stream=True),
    "code": HubText(
        "codeparrot/codeparrot-clean",
        None,
        "content",
        "train",
        "validation",
        # The last file is the one that the data set's authors hold out
        files={"train": "file-000000000001.json.gz", "validation": "file-000000000054.json.gz"},
        stream=True,
    ),
}
MIXTURES = {"mixed": ("wikitext2", "fineweb-edu", "tinystories", "alpaca", "code")}
"""Presets that stand for several: encyclopedia, web, stories, instructions with answers, Python code. A model that
was calibrated on one kind of text alone is much worse on the others."""
BUILTIN = "builtin"
SHUFFLE_BUFFER = 10_000  # documents among which the next one is drawn from a streamed data set
ALLOWED = (
    f"a preset ({', '.join([BUILTIN, *MIXTURES, *PRESETS])}), a text, .json, .jsonl or .safetensors file, or a hub "
    "data set as NAME[:CONFIG[:SPLIT]]"
)


@dataclass(frozen=True)
class Documents:
    """Texts, where they come from, and what belongs between two of them."""

    texts: list[str] = field(repr=False)
    description: str
    separator: str = "\n\n"


def load_documents(
    data: str, name: str | None, purpose: Purpose, characters: int, seed: int, chat: Render | None = None
) -> Documents:
    """Load texts.

    Args:
        data: Preset, file or hub data set.
        name: Field of records that holds the text, or several joined by commas; None is the preset's, or "text".
        purpose: Which split of a preset is meant.
        characters: Enough text; large hub data sets are read only that far.
        seed: Seed for the order in which large hub data sets are read to calibrate.
        chat: Writes records that are conversations, if no field is named; the others are read by their field.

    Raises:
        CalibrationError: nothing there, unreadable, wrong field, or no text.
    """
    path = Path(data).expanduser()
    conversations = _Conversations(None if name else chat)
    if data == BUILTIN:
        texts = language_reference() if purpose == "calibration" else library_docstrings()
        description = "Python language reference" if purpose == "calibration" else "Python library docstrings"
    elif data in PRESETS:
        texts = _load_hub(PRESETS[data], name, purpose, characters, seed, conversations)
        description = f"{data} ({getattr(PRESETS[data], purpose)})"
    elif path.is_file():
        texts, description = _load_file(path, name, conversations), path.name
    else:
        texts = _load_hub(_parse_hub(data), name, purpose, characters, seed, conversations)
        description = data
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(
            f"{data} holds no text",
            allowed="at least one document that is not empty",
            next_step="check the file, or --field",
        )
    if conversations.found and conversations.found == len(texts):
        return Documents(texts, f"{description}, chat template", separator="")  # templates end their texts
    return Documents(texts, description)


@dataclass
class _Conversations:
    """Writes records that are conversations, and counts them."""

    render: Render | None
    found: int = 0

    def text(self, record: Any) -> str | None:
        text = self.render(record) if self.render and isinstance(record, dict) else None
        self.found += bool(text and text.strip())
        return text


def _parse_hub(data: str) -> HubText:
    """A hub data set as the user writes it: NAME[:CONFIG[:SPLIT]]."""
    path, _, rest = data.partition(":")
    config, _, split = rest.partition(":")
    split = split or "train"
    # a part of a split, such as train[:10%], can't be streamed
    return HubText(path, config or None, "text", split, split, stream="[" not in split)


def _load_file(path: Path, name: str | None, conversations: _Conversations) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _texts(json.loads(content), name, str(path), conversations)
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in content.splitlines() if line.strip()]
            return _texts(records, name, str(path), conversations)
        return [content]
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{path} can't be read ({type(error).__name__}: {error})",
            allowed="UTF-8 text; .json with a list of strings or records; .jsonl with one of these a line",
            next_step="check the file's encoding and format",
        ) from error


def _texts(records: Any, name: str | None, where: str, conversations: _Conversations) -> list[str]:
    """Strings as they are, conversations by their template, other records by their field."""
    if not isinstance(records, Iterable) or isinstance(records, str | dict):
        raise CalibrationError(
            f"{where} holds a {type(records).__name__}",
            allowed="a list of strings, or a list of records and --field",
            next_step="convert it",
        )
    fields = (name or "text").split(",")
    texts = []
    for record in records:
        if isinstance(record, str):
            texts.append(record)
            continue
        conversation = conversations.text(record)
        if conversation is not None:
            texts.append(conversation)
            continue
        keys = list(record) if isinstance(record, dict) else []
        absent = [f for f in fields if not (isinstance(record, dict) and isinstance(record.get(f), str))]
        if absent:
            raise CalibrationError(
                f"{where} has a record without text in field {', '.join(absent)}; it has {keys or type(record)}",
                allowed="strings, or records that all have the field",
                next_step="name the field with --field, or several as --field instruction,output",
            )
        texts.append("\n".join(record[f] for f in fields if record[f]))
    return texts


def _load_hub(
    hub: HubText, name: str | None, purpose: Purpose, characters: int, seed: int, conversations: _Conversations
) -> list[str]:
    import datasets

    split = getattr(hub, purpose)
    try:
        rows = datasets.load_dataset(
            hub.path,
            hub.config,
            data_files=hub.files,
            split=split,
            revision=hub.revision,
            streaming=hub.stream,
        )
    except Exception as error:  # datasets raises its own, the hub's and the network's errors
        first = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"data set {hub.path} (split {split}) can't be loaded ({type(error).__name__}: {first})",
            allowed=ALLOWED,
            next_step="check the name and the network; without one, pass a file or 'builtin'",
        ) from error
    if not hub.stream:
        return _texts(rows, name or hub.field, hub.path, conversations)
    stream: Any = rows
    if purpose == "calibration":
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    texts, length = [], 0
    for row in stream:
        texts += _texts([row], name or hub.field, hub.path, conversations)
        length += len(texts[-1])
        if length >= characters:
            break
    return texts
