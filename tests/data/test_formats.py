"""Records of files, and texts that hold records."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from eigenslice.data import formats
from eigenslice.data.formats import Broken, read_records, read_text, records_in
from eigenslice.data.text_files import open_file
from eigenslice.errors import CalibrationError
from tests.messages import check_message

BREAKS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
ROWS = [{"text": BREAKS, "n": "1"}, {"text": 'with "quotes", commas;\tand\nbreaks', "n": "2"}, {"text": "", "n": "3"}]


def file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode())
    return path


def records(path: Path) -> list[tuple[str, Any]]:
    """All records with their places."""
    found = read_records(open_file(path), lambda value: "text" in value)
    return [(f"{found.unit} {number}", record) for number, record in found.numbered]


def values(path: Path) -> list[Any]:
    return [value for _, value in records(path)]


def refused(path: Path) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        records(path)
    return caught.value


def lines(ascii_only: bool) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_lines_are_cut_at_line_feeds_only(name: str, ascii_only: bool, tmp_path: Path) -> None:
    assert values(file(tmp_path, name, lines(ascii_only))) == ROWS
    assert values(file(tmp_path, name, lines(ascii_only).replace("\n", "\r\n"))) == ROWS


def test_control_characters_in_strings_are_text(tmp_path: Path) -> None:
    assert values(file(tmp_path, "a.jsonl", '"a\x0bb\x0cc\td"\n"e"\n')) == ["a\x0bb\x0cc\td", "e"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_one_whatever_the_name(name: str, indent: int | None, tmp_path: Path) -> None:
    assert values(file(tmp_path, name, json.dumps(ROWS, indent=indent))) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_objects_one_after_the_other_are_records(name: str, tmp_path: Path) -> None:
    assert values(file(tmp_path, name, "\n".join(json.dumps(row, indent=2) for row in ROWS))) == ROWS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"version": "1", "data": ["a", "b"]}, ["a", "b"]),
        ({"text": "a", "tags": ["x"]}, [{"text": "a", "tags": ["x"]}]),
        ([], []),
    ],
)
def test_an_object_is_a_record_or_holds_a_list(content: Any, expected: Any, tmp_path: Path) -> None:
    assert values(file(tmp_path, "a.json", json.dumps(content))) == expected


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"train": ["a"], "test": ["b"]}, "the lists train, test"),
        ({"body": "a"}, "no list, but body"),
        ("a", "a str"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_json_without_one_list_is_refused(content: Any, held: str, tmp_path: Path) -> None:
    check_message(refused(file(tmp_path, "a.json", json.dumps(content))), "a.json", held)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '"a"\n\n"b"\n{"c": \n', 4),
        ("a.jsonl", "no JSON\n", 1),
        ("a.jsonl", '{"a":\n1\n', 1),
        ("a.json", '[\n"a",\n"b" "c"\n]', 3),
        ("a.json", '{"a": 1}\n{"a": 2}\n{"a" 3}\n', 3),
        ("a.jsonl", '"a"\n' + "[" * 100_000 + "\n", 2),
        ("a.json", "[" * 100_000, 1),
        ("a.jsonl", '"a"\n{"n": ' + "9" * 5000 + "}\n", 2),
    ],
)
def test_the_line_that_is_no_json_is_told(name: str, content: str, line: int, tmp_path: Path) -> None:
    check_message(refused(file(tmp_path, name, content)), "can't be read", f"line {line} is no JSON")


def test_places_are_lines_or_records(tmp_path: Path) -> None:
    assert [place for place, _ in records(file(tmp_path, "a.jsonl", '\n"a"\n\n"b"\n'))] == ["line 2", "line 4"]
    assert [place for place, _ in records(file(tmp_path, "a.json", '\n["a",\n"b"]'))] == ["record 1", "record 2"]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.CSV", "|"), ("a.tsv", "\t")]
)
def test_tables_of_text_are_what_csv_wrote(name: str, delimiter: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert records(tmp_path / name) == [("line 2", ROWS[0]), ("line 3", ROWS[1]), ("line 5", ROWS[2])]


def test_long_cells_are_read_and_the_limit_of_csv_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert values(file(tmp_path, "a.csv", "text\n" + "x" * 200_000)) == [{"text": "x" * 200_000}]
    assert csv.field_size_limit() == before


def test_rows_that_do_not_fit_the_header_are_broken(tmp_path: Path) -> None:
    found = values(file(tmp_path, "a.csv", "text,n\na,1\nb, c,2\n\nd\ne,3\n"))
    assert [type(row) for row in found] == [dict, Broken, Broken, dict]
    assert "3 values for 2 columns" in found[1].reason


@pytest.mark.parametrize(
    ("content", "found"),
    [("text,text\na,b\n", "two columns 'text'"), ('text\n"a\n', "line 2 is no CSV"), ('text\n\n"a"b\n', "line 3")],
)
def test_broken_tables_of_text_are_refused(content: str, found: str, tmp_path: Path) -> None:
    check_message(refused(file(tmp_path, "a.csv", content)), "a.csv", found)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables_give_their_rows(kind: str, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}], "n": i} for i in range(700)]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as out, new(out, table.schema) as writer:
            writer.write_table(table)
    found = records(path)
    assert [row for _, row in found] == rows
    assert found[-1][0] == "row 700"


@pytest.mark.parametrize("content", [b"", b"PAR1" + b"x" * 40 + b"PAR1", b"\xff\xff\xff\xff\x10\0\0\0" + b"x" * 40])
def test_broken_tables_are_refused(content: bytes, tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(content)
        check_message(refused(tmp_path / name), name)


def test_json_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(formats, "LARGEST_VALUE", 20)
    check_message(refused(file(tmp_path, "a.json", json.dumps(ROWS))), "is too large", "20 characters")
    check_message(refused(file(tmp_path, "a.jsonl", '"a"\n"' + "b" * 20 + '"\n')), "line 2 has more than 20")


def test_a_text_is_read_as_far_as_asked(tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", "one\r\ntwo\rthree")
    assert read_text(open_file(path), 100) == ("one\ntwo\nthree", False)
    assert read_text(open_file(path), 5) == ("one\nt", True)


def test_a_binary_file_that_begins_like_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        read_text(open_file(file(tmp_path, "a.txt", "word " * 2000 + "\0")), 100_000)
    check_message(caught.value, "a.txt", "NUL")


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (lines(True), "a JSON object a line"),
        (lines(True) * 2000, "a JSON object a line"),
        (json.dumps(ROWS), "JSON"),
        (json.dumps(ROWS[0], indent=1), "JSON"),
        ("{not JSON}\n", None),
        ("[1] Smith, J.: a book\n", None),
        ("a text\n" + lines(True), None),
        ("", None),
    ],
    ids=range(8),
)
def test_texts_that_are_records_are_seen(text: str, held: str | None) -> None:
    assert records_in(text) == held
