"""Records of files: JSON, JSON lines, CSV and tables; or the text that a file is."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any

from eigenslice.data.text_files import TextFile, reading, refused
from eigenslice.errors import CalibrationError, one_line

LARGEST = 2**27
"""Characters of text that are taken from a file at most, from its start: tokenizers need a hundred times the memory."""
LARGEST_VALUE = 2**30
"""Characters of a JSON file, or of a line or a cell, which are read as a whole."""
WHITE = " \t\r\n"  # JSON's white space; control characters in strings are allowed, too (strict=False)
SAMPLE = 2**16  # characters that tell whether a text is JSON lines
ROWS = 256  # of a table at once
DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Records:
    """Records with their numbers, counted from 1, and the word for one of them."""

    unit: str
    numbered: Iterable[tuple[int, Any]]


@dataclass(frozen=True)
class Broken:
    """A record that isn't one, and why."""

    reason: str


def read_records(file: TextFile, is_record: Callable[[dict[str, Any]], bool]) -> Records:
    """Return the records of a file of any kind but text.

    Args:
        file: The file.
        is_record: Condition for an object to be a record itself; other objects may hold a list of records.

    Raises:
        CalibrationError: here or while they are read; it names the line.
    """
    if file.kind == "csv":
        return Records("line", _csv(file))
    if file.kind in ("parquet", "arrow"):
        return Records("row", _table(file))
    return _json(file, is_record)


def read_text(file: TextFile, limit: int) -> tuple[str, bool]:
    """A text's first characters, and whether there are more.

    Raises:
        CalibrationError: it can't be read.
    """
    with reading(file.path, file), file.characters(newline=None) as stream:
        text = stream.read(limit)
        more = bool(stream.read(1))
    if "\0" in text:
        raise refused(file.path, "is no text: it is a binary file, with NUL characters")
    return text, more


def records_in(text: str) -> str | None:
    """Return the form of records in a text that is read as plain text; None if there are no records."""
    start = text.lstrip(WHITE)[:SAMPLE]
    if start[:1] == "{":
        lines = [line for line in start.split("\n") if line.strip(WHITE)]
        if len(start) == SAMPLE and len(lines) > 1:
            lines.pop()  # it is cut
        if all(isinstance(_parsed(line), dict) for line in lines):
            return "a JSON object a line"
    if re.match(r"\[\s*[\[{\"]|\{\s*\"", start) and isinstance(_parsed(text), list | dict):
        return "JSON"
    return None


def _is_json(text: str) -> bool:
    return _parsed(text) is not None or text.strip(WHITE) == "null"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _json(file: TextFile, is_record: Callable[[dict[str, Any]], bool]) -> Records:
    """A record a line, or a document that holds them, whatever the name says."""
    number, first, more = _first_line(file)
    named_lines = file.kind == "lines"
    start = first.lstrip(WHITE)[:1]
    if more or (named_lines and start != "["):
        if _is_json(first):
            return Records("line", _lines(file))
        if named_lines and first and start not in ("[", "{"):
            _load(file, first, number)  # raises the error
    try:
        values = _documents(file)
    except CalibrationError:
        if named_lines:
            _load(file, first, number)
        raise
    if len(values) != 1:
        return Records("record", enumerate(values, 1))
    return Records("record", enumerate(_listed(file, values[0], is_record), 1))


def _first_line(file: TextFile) -> tuple[int, str, bool]:
    """Number and text of the first line that isn't blank, and whether there is another."""
    with reading(file.path, file), file.characters(newline="\n") as stream:
        lines = _split(file, stream)
        number, line = next(lines, (1, ""))
        return number, line, next(lines, None) is not None


def _split(file: TextFile, stream: TextIOWrapper) -> Iterator[tuple[int, str]]:
    """Lines that aren't blank, with their numbers: cut at line feeds only, as strings may hold other breaks."""
    number = 0
    while line := stream.readline(LARGEST_VALUE + 1):
        number += 1
        if len(line) > LARGEST_VALUE:
            raise _too_large(file, f"line {number} has more than {LARGEST_VALUE} characters")
        if line.strip(WHITE):
            yield number, line


def _lines(file: TextFile) -> Iterator[tuple[int, Any]]:
    with reading(file.path, file), file.characters(newline="\n") as stream:
        for number, line in _split(file, stream):
            yield number, _load(file, line, number)


def _load(file: TextFile, line: str, number: int) -> Any:
    try:
        return json.loads(line, strict=False)
    except json.JSONDecodeError as error:
        raise _no_json(file, number, f"{error.msg}, column {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise _no_json(file, number, _why(error)) from error


def _documents(file: TextFile) -> list[Any]:
    """The values of a JSON file: one, or several one after the other."""
    with reading(file.path, file), file.characters(newline="\n") as stream:
        text = stream.read(LARGEST_VALUE + 1)
    if len(text) > LARGEST_VALUE:
        raise _too_large(file, f"has more than {LARGEST_VALUE} characters, and JSON is read as a whole")
    decoder, values, at = json.JSONDecoder(strict=False), [], 0
    try:
        while (start := re.compile(rf"[{WHITE}]*").match(text, at).end()) < len(text):  # pyright: ignore[reportOptionalMemberAccess]
            value, at = decoder.raw_decode(text, start)
            values.append(value)
    except json.JSONDecodeError as error:
        raise _no_json(file, error.lineno, f"{error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _no_json(file, text.count("\n", 0, at) + 1, _why(error)) from error
    return values


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else one_line(error)


def _no_json(file: TextFile, line: int, why: str) -> CalibrationError:
    return refused(file.path, f"can't be read: line {line} is no JSON ({why})")


def _too_large(file: TextFile, why: str) -> CalibrationError:
    return refused(file.path, f"is too large: {why}", "write one record a line (.jsonl), or take a part of it")


def _listed(file: TextFile, value: Any, is_record: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """The records of a JSON document: a list, a record, or an object with a single list of records."""
    if isinstance(value, list):
        return value
    content = ""
    if isinstance(value, dict):
        lists = {name: part for name, part in value.items() if isinstance(part, list)}
        if is_record(value):
            return [value]
        if len(lists) == 1:
            return next(iter(lists.values()))
        content = f" with {'no list' if not lists else 'the lists ' + one_line(', '.join(lists))}"
        if not lists:
            content += f", but {one_line(', '.join(value))}"
    raise CalibrationError(
        f"{file.path} holds a {type(value).__name__}{content}",
        allowed="a list of strings or records, or an object that holds one such list",
        next_step="write the list alone; a file for each, if there are several",
    )


def _csv(file: TextFile) -> Iterator[tuple[int, Any]]:
    """Rows as records of the header's fields, with the numbers of their first lines."""
    limit = csv.field_size_limit(LARGEST_VALUE)
    try:
        with reading(file.path, file):
            with file.characters(newline="") as stream:
                delimiter = _delimiter(file, stream.readline(SAMPLE))
            with file.characters(newline="") as stream:
                yield from _rows(file, csv.reader(stream, delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(limit)


def _delimiter(file: TextFile, header: str) -> str:
    if file.suffix == ".tsv":
        return "\t"
    return next((delimiter for delimiter in DELIMITERS if delimiter in header), ",")


def _rows(file: TextFile, reader: Any) -> Iterator[tuple[int, Any]]:
    header, line = None, 0
    try:
        for row in reader:
            line, start = reader.line_num, line + 1
            if not row:
                continue
            if header is None:
                header = _header(file, row)
            elif len(row) != len(header):
                reason = f"has {len(row)} values for {len(header)} columns; the header has {one_line(header)}"
                yield start, Broken(reason)
            else:
                yield start, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise refused(file.path, f"can't be read: line {line + 1} is no CSV ({one_line(error)})") from error


def _header(file: TextFile, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise refused(file.path, f"has two columns {twice!r}", "rename one of them")
    return names


def _table(file: TextFile) -> Iterator[tuple[int, Any]]:
    with reading(file.path):
        number = 0
        for batch in _record_batches(file):
            batch.validate(full=True)  # offsets that lead out of the file would end the process
            for start in range(0, batch.num_rows, ROWS):
                for row in batch.slice(start, ROWS).to_pylist():
                    number += 1
                    yield number, row


def _record_batches(file: TextFile) -> Iterator[Any]:
    import pyarrow

    if file.kind == "parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(str(file.path)) as table:
            yield from table.iter_batches(batch_size=ROWS)
        return
    with pyarrow.memory_map(str(file.path)) as source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            opened = pyarrow.ipc.open_file(source)
            yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
