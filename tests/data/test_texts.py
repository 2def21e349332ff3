"""Documents from files and data sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from eigenslice.data import texts
from eigenslice.data.texts import PRESETS, Documents, load_documents
from eigenslice.errors import CalibrationError
from tests.messages import check_message

RECORDS = [
    {"text": "first", "question": "who", "answer": "me", "number": 1},
    {"text": "second", "question": "why", "answer": "", "number": 2},
]


def documents(path: Path | str, field: str | None = None, characters: int = 10_000, seed: int = 0) -> Documents:
    return load_documents(str(path), field, "calibration", characters, seed)


def refused(path: Path | str, field: str | None = None) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        documents(path, field)
    return caught.value


def file(folder: Path, name: str, content: Any) -> Path:
    """Write a file: text as it is, lists to .jsonl line by line, anything else as JSON."""
    path = folder / name
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "\n".join(json.dumps(record) for record in content) + "\n\n"
    elif not isinstance(content, str):
        content = json.dumps(content)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_a_text_file_is_one_document(name: str, tmp_path: Path) -> None:
    result = documents(file(tmp_path, name, "größer\n\nals {gedacht}\n"))
    assert result.texts == ["größer\n\nals {gedacht}\n"]
    assert result.description == name


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_strings_are_documents(name: str, tmp_path: Path) -> None:
    assert documents(file(tmp_path, name, ["one", "zwei ä"])).texts == ["one", "zwei ä"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (None, ["first", "second"]),
        ("question", ["who", "why"]),
        ("question,answer", ["who\nme", "why"]),
        ("answer,question", ["me\nwho", "why"]),
    ],
)
def test_records_give_the_text_of_their_fields(
    name: str, field: str | None, expected: list[str], tmp_path: Path
) -> None:
    assert documents(file(tmp_path, name, RECORDS), field).texts == expected


def test_strings_and_records_may_be_mixed(tmp_path: Path) -> None:
    assert documents(file(tmp_path, "a.json", ["zero", *RECORDS])).texts == ["zero", "first", "second"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    assert documents(file(tmp_path, "a.json", ["", " \n", "one"])).texts == ["one"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("field", ["quest", "question,quest", "number"])
def test_a_wrong_field_is_refused_and_the_fields_there_are_listed(name: str, field: str, tmp_path: Path) -> None:
    path = file(tmp_path, name, RECORDS)
    error = refused(path, field)
    check_message(error, str(path), field.split(",")[-1], *RECORDS[0])
    assert "--field" in error.next_step


def test_records_without_text_need_a_field(tmp_path: Path) -> None:
    check_message(refused(file(tmp_path, "a.json", [{"body": "x"}])), "field text", "body")


@pytest.mark.parametrize("record", [3, None, ["x"]], ids=repr)
def test_records_that_are_none_are_refused(record: Any, tmp_path: Path) -> None:
    check_message(refused(file(tmp_path, "a.json", ["x", record])), "a.json", type(record).__name__)


@pytest.mark.parametrize("content", [{"text": "x"}, "just a string", 3, None], ids=repr)
def test_json_that_is_no_list_is_refused(content: Any, tmp_path: Path) -> None:
    path = file(tmp_path, "a.json", json.dumps(content))
    error = refused(path)
    check_message(error, str(path), type(content).__name__)
    assert "list" in error.allowed


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b'["one"'), ("a.jsonl", b'"one"\n{"te'), ("a.txt", b"\xff\xfe\x80"), ("a.json", b"\x80")],
    ids=["json", "jsonl", "txt-encoding", "json-encoding"],
)
def test_a_broken_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refused(path)
    check_message(error, str(path), "can't be read")
    assert "UTF-8" in error.allowed


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\t\n"), ("a.json", []), ("a.json", ["", " "]), ("a.jsonl", "\n\n")],
)
def test_a_file_without_text_is_refused(name: str, content: Any, tmp_path: Path) -> None:
    path = file(tmp_path, name, content)
    check_message(refused(path), str(path), "holds no text")


@pytest.mark.parametrize("data", ["no/such/file.txt", "nobody/of-this-name", "nobody/nothing:config:test"])
def test_what_is_neither_file_nor_data_set_is_refused(data: str) -> None:
    error = refused(data)
    check_message(error, data.partition(":")[0], "test" if ":" in data else "train")
    assert all(name in error.allowed for name in ["builtin", *PRESETS])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_that_can_not_be_reached_points_to_the_builtin_text(preset: str) -> None:
    error = refused(preset)
    check_message(error, PRESETS[preset].path, "can't be loaded")
    assert "'builtin'" in error.next_step


def test_the_builtin_text_has_one_part_for_calibration_and_one_for_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(texts, "language_reference", lambda: ["topics"])
    monkeypatch.setattr(texts, "library_docstrings", lambda: ["docstrings"])
    calibration = load_documents("builtin", None, "calibration", 100, 0)
    evaluation = load_documents("builtin", None, "evaluation", 100, 0)
    assert (calibration.texts, evaluation.texts) == (["topics"], ["docstrings"])
    assert calibration.description != evaluation.description


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
