"""Rows of data sets: hub data sets, and folders of data files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eigenslice.data.formats import Records
from eigenslice.data.presets import ALLOWED, HubText
from eigenslice.data.text_files import local_path
from eigenslice.errors import CalibrationError, cause_of, one_line

SHUFFLE_BUFFER = 10_000  # documents among which the next one is drawn from a streamed data set
ADVICE = {
    "scripts are no longer supported": "download one of its data files and pass that file: the data set is a program, "
    "which isn't run",
    "gated": "accept the data set's terms on the hub, and log in (hf auth login)",
    "onfig name is missing": "name one of its configurations: NAME:CONFIG",
    "BuilderConfig": "name one of its configurations: NAME:CONFIG",
    "nknown split": "name one of its splits: NAME:CONFIG:SPLIT",
    "Bad split": "name one of its splits: NAME:CONFIG:SPLIT",
    "DataFilesNotFound": "pass a folder or data set with .parquet, .csv, .json, .jsonl or .txt files, or a file itself",
    "EmptyDataset": "pass a folder or data set with .parquet, .csv, .json, .jsonl or .txt files, or a file itself",
    "Generat": "pass one of its data files, which is then read record by record",
}
SAVED = ("state.json", "dataset_dict.json")  # a file of datasets' save_to_disk


def parse_hub(data: str) -> HubText:
    """A data set as the user writes it, NAME[:CONFIG[:SPLIT]], on the hub or in a folder.

    Raises:
        CalibrationError: the name is that of a file, or of a path that isn't there.
    """
    if "://" in data:
        raise CalibrationError(
            f"{data} is a URL", allowed=ALLOWED, next_step="download the file and pass its path, or name the data set"
        )
    path, colon, rest = data.partition(":")
    folder = local_path(path)
    if folder and colon and folder.is_file():
        raise CalibrationError(
            f"{path} is a file, and {colon}{rest} names a part of a data set",
            allowed=ALLOWED,
            next_step=f"pass {path} alone",
        )
    config, _, split = rest.partition(":")
    split = split or "train"
    # a part of a split, such as train[:10%], can't be streamed
    return HubText(str(folder or path), config or None, "text", split, split, stream="[" not in split)


def hub_records(hub: HubText, split: str, seed: int | None) -> Records:
    """Rows of a split; with a seed, a large data set is read in an order that the seed decides.

    Raises:
        CalibrationError: here or while they are read.
    """
    try:
        rows = _load(hub, split)
    except Exception as error:  # datasets raises its own, the hub's and the network's errors
        raise _failed(hub, split, error, "loaded") from error
    if hub.stream and seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return Records("in the order of the seed, row", _numbered(rows, hub, split))
    return Records("row", _numbered(rows, hub, split))


def _load(hub: HubText, split: str) -> Any:
    import datasets
    from datasets import packaged_modules

    if hub.path in packaged_modules._PACKAGED_DATASETS_MODULES:  # would read all such files of the current folder
        raise ValueError(f"{hub.path} is the name of a format, not of a data set")
    folder = Path(hub.path)
    if any((folder / name).is_file() for name in SAVED):
        saved: Any = datasets.load_from_disk(folder)
        rows = saved[split] if (folder / SAVED[1]).is_file() else saved
        return rows.to_iterable_dataset() if hub.stream else rows
    return datasets.load_dataset(
        hub.path,
        hub.config,
        data_files=hub.files,
        split=split,
        revision=hub.revision,
        streaming=hub.stream,
    )


def _numbered(rows: Any, hub: HubText, split: str) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for row in rows:
            number += 1
            yield number, row
    except Exception as error:  # as above; files are opened, and the network is asked, on the way
        raise _failed(hub, split, error, f"read past row {number}") from error


def _failed(hub: HubText, split: str, error: Exception, what: str) -> CalibrationError:
    cause = cause_of(error)
    reason = f"{type(cause).__name__}: {one_line(cause)}"  # the second line often has the allowed names
    advice = (step for words, step in ADVICE.items() if words in f"{type(error).__name__}, {reason}")
    return CalibrationError(
        f"data set {hub.path} (split {split}) can't be {what} ({reason})",
        allowed=ALLOWED,
        next_step=next(advice, "check the name and the network; without one, pass a file or 'builtin'"),
    )
