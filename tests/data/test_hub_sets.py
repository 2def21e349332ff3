"""Data sets of the hub and of folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_texts import documents, file, refused
from tests.messages import check_message


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A data set in a folder, with a training and a test split."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    file(folder, "train.jsonl", [{"text": f"document {i:03d}", "topic": f"t{i}"} for i in range(100)])
    file(folder, "test.jsonl", [{"text": f"held out {i}", "topic": "x"} for i in range(3)])
    return folder


def test_a_folder_is_a_data_set(corpus: Path) -> None:
    found = documents(corpus).texts
    assert sorted(found) == [f"document {i:03d}" for i in range(100)]


def test_another_split_of_a_data_set_can_be_named(corpus: Path) -> None:
    result = documents(f"{corpus}::test")
    assert sorted(result.texts) == ["held out 0", "held out 1", "held out 2"]
    assert result.description == f"{corpus}::test"


def test_a_split_that_a_data_set_lacks_is_refused_by_name(corpus: Path) -> None:
    check_message(refused(f"{corpus}::validation"), str(corpus), "split validation")


def test_a_part_of_a_split_can_be_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", corpus.parent / "cache")
    result = documents(f"{corpus}::train[10:13]")
    assert result.texts == ["document 010", "document 011", "document 012"]


def test_fields_of_a_data_set_are_named_as_those_of_a_file(corpus: Path) -> None:
    found = documents(corpus, "topic,text").texts
    assert "t7\ndocument 007" in found
    check_message(refused(corpus, "title"), str(corpus), "title", "text", "topic")


def test_a_data_set_is_read_in_an_order_that_the_seed_decides(corpus: Path) -> None:
    first, again, other = (documents(corpus, seed=seed).texts for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_a_large_data_set_is_read_only_as_far_as_needed(corpus: Path) -> None:
    found = documents(corpus, characters=300).texts
    assert 300 <= sum(map(len, found)) < 350


def test_fields_that_are_not_asked_for_do_not_count_as_text(tmp_path: Path) -> None:
    rows = [{"text": f"document {i:03d}", "page": "x" * 1000} for i in range(20)]
    (tmp_path / "corpus").mkdir()
    file(tmp_path / "corpus", "train.jsonl", rows)
    assert sum(map(len, documents(tmp_path / "corpus", characters=100).texts)) >= 100


def test_a_first_document_that_is_more_than_enough_is_used(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    file(tmp_path / "corpus", "train.jsonl", [{"text": "long " * 100}, {"text": "longer " * 100}])
    assert len(documents(tmp_path / "corpus", characters=100).texts) == 1


class Failing:
    """A streamed data set whose third row can't be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def shuffle(self, seed: int, buffer_size: int) -> "Failing":
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        yield {"text": "b"}
        raise self.error


def stub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize("data", ["some/set", "some/set::train[:10%]", "c4", "wikitext2"])
@pytest.mark.parametrize(
    "error", [ConnectionError("gone\nfor good"), ValueError(""), UnicodeDecodeError("a", b"", 0, 1, "")]
)
def test_rows_that_can_not_be_read_are_told_as_data_sets_that_can_not_be_opened(
    data: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, Failing(error))
    check_message(refused(data), "can't be read past row 2", type(error).__name__)


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "download one of its data files"),
        (ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), "NAME:CONFIG"),
        (ValueError("BuilderConfig 'x' not found. Available: ['a']"), "NAME:CONFIG"),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), "NAME:CONFIG:SPLIT"),
        (RuntimeError("Dataset 'x' is a gated dataset on the Hub."), "hf auth login"),
        (type("DataFilesNotFoundError", (FileNotFoundError,), {})("No (supported) data files found"), ".parquet"),
        (ConnectionError("Couldn't reach the Hub"), "'builtin'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_of_data_sets_get_a_next_step(error: Exception, next_step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, error)
    found = refused("some/set")
    check_message(found, "some/set", " ".join(str(error).split()))
    assert next_step in found.next_step


def test_rows_that_can_not_be_used_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": 3}])
    result = documents("some/set::train[:4]")
    assert result.texts == ["a", "b"]
    (note,) = result.notes
    assert "2 of 4 records can't be used" in note
    assert "row 2 has no text in field text (null)" in note


def test_blank_rows_of_a_preset_are_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, [{"text": "a"}, {"text": ""}])
    assert not documents("wikitext2").notes
    assert documents("some/set::train[:2]").notes


def test_a_stream_without_a_record_of_use_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Failing):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            while True:
                yield {"body": "a"}

    stub(monkeypatch, Endless(ValueError()))
    check_message(refused("some/set"), "none of 10000 records", "body")


@pytest.mark.parametrize("data", ["json", "text", "parquet"])
def test_the_name_of_a_format_is_no_data_set(data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """datasets would read all such files of the current folder."""
    file(tmp_path, "a.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    check_message(refused(data), data, "the name of a format")


@pytest.mark.parametrize("splits", [False, True])
def test_a_saved_data_set_is_read(splits: bool, tmp_path: Path) -> None:
    import datasets

    rows: Any = datasets.Dataset.from_list([{"text": f"document {i}"} for i in range(3)])
    saved = datasets.DatasetDict({"train": rows}) if splits else rows
    saved.save_to_disk(tmp_path / "saved")
    assert sorted(documents(tmp_path / "saved").texts) == ["document 0", "document 1", "document 2"]


def test_the_home_folder_is_expanded(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(corpus.parent))
    assert len(documents("~/corpus").texts) == 100
    assert len(documents("~/corpus::test").texts) == 3


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", ["x"])
    check_message(refused(f"{path}::train[:1]"), "a.jsonl is a file")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path)
    check_message(error, str(tmp_path))
    assert ".parquet" in error.next_step
