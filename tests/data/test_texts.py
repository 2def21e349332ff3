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


@pytest.mark.parametrize("content", ["just a string", 3, None], ids=repr)
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


@pytest.mark.parametrize("data", ["no/such/file.txt", "./nothing", "https://host/file.json"])
def test_what_is_no_file_and_can_be_no_data_set_is_refused(data: str) -> None:
    error = refused(data)
    check_message(error, data)
    assert "data set" not in error.found
    assert all(name in error.allowed for name in ["builtin", *PRESETS])


@pytest.mark.parametrize("data", ["nobody/of-this-name", "nobody/nothing:config:test"])
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


def test_a_text_that_is_records_is_said_to_be(tmp_path: Path) -> None:
    (note,) = documents(file(tmp_path, "a.txt", '{"text": "x"}\n{"text": "y"}\n')).notes
    assert "a JSON object a line" in note
    assert "plain text" in note


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_only_the_first_part_of_a_huge_file_is_read(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts, "LARGEST", 20)
    path = file(tmp_path, name, "one two\n" * 9 if name == "a.txt" else ["one two"] * 9)
    result = documents(path)
    assert 20 <= sum(map(len, result.texts)) < 28
    assert "more than 20 characters" in result.notes[-1]
    assert not result.more
    assert not documents(file(tmp_path, "b.txt", "one two")).notes


def test_a_file_to_evaluate_on_is_read_as_far_as_needed(tmp_path: Path) -> None:
    for path in (file(tmp_path, "a.txt", "one two\n" * 9), file(tmp_path, "a.jsonl", ["one two"] * 9)):
        found = load_documents(str(path), None, "evaluation", 20, 0)
        assert found.more
        assert 20 <= sum(map(len, found.texts)) < 28
        whole = load_documents(str(path), None, "evaluation", 1000, 0)
        assert (whole.more, whole.texts) == (False, documents(path).texts)
