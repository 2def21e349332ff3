"""Data sets that have a name of their own."""

from dataclasses import dataclass
from typing import Literal

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
ALLOWED = (
    f"a preset ({', '.join([BUILTIN, *MIXTURES, *PRESETS])}), a file (text, .json, "
    ".jsonl, .csv, .parquet, .safetensors), or a hub data set as NAME[:CONFIG[:SPLIT]]"
)
