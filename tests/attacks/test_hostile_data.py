"""Calibration files of any bytes and any structure: tokens, or one message."""

import csv
import gzip
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eigenslice.data import Tokens, evaluation_tokens
from eigenslice.data.text_files import BINARY_NAMES, KINDS, PACKED
from eigenslice.errors import CalibrationError, EigensliceWarning
from eigenslice.options.calibration_text import CalibrationOptions
from tests import words
from tests.data.test_tokens import CONFIG
from tests.messages import check_message

BOUNDED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BINARY = " ".join(BINARY_NAMES.values()).split()
SUFFIXES = st.sampled_from(["", ".txt", ".md", *KINDS, *PACKED, ".json.gz", ".csv.xz", ".SAFETENSORS", *BINARY])
STARTS = st.sampled_from([b"", b"[", b'{"text": "', b"text\n", b"\xef\xbb\xbf", b"\xff\xfe"]) | st.sampled_from(
    [b"PAR1", b"ARROW1", b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\xff\xff\xff\xff", b"GGUF"]
)
TEXTS = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["w5 w6", "", " ", "\ud800", "a\u2028b\x85c"])
NAMES = st.sampled_from(
    ["text", "messages", "conversations", "instruction", "output", "role", "content", "from", "value"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXTS, inner, max_size=4), max_leaves=8
)
CELLS = st.text(max_size=6) | st.sampled_from(["text", "w5 w6", 'a "b", c\n'])
FIELDS = st.none() | NAMES | st.sampled_from(["instruction,output", ",", "\ud800"])
TOKENIZER = words.tokenizer()


def read(path: Path, field: str | None = None) -> Tokens | None:
    """The tokens of a file, None if it is refused; anything else fails."""
    options = CalibrationOptions(data=str(path), field=field or (), samples=3, seqlen=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EigensliceWarning)
        try:
            return evaluation_tokens(options, lambda: TOKENIZER, CONFIG)
        except CalibrationError as error:
            check_message(error)
            return None


@BOUNDED
@given(suffix=SUFFIXES, start=STARTS, rest=st.binary(max_size=60), packed=st.booleans())
def test_any_bytes(tmp_path: Path, suffix: str, start: bytes, rest: bytes, packed: bool) -> None:
    path = tmp_path / f"file{suffix}"
    content = start + rest
    path.write_bytes(gzip.compress(content) if packed else content)
    read(path)


@BOUNDED
@given(records=st.lists(VALUES, max_size=4), field=FIELDS, ascii_only=st.booleans())
def test_any_records(tmp_path: Path, records: list[Any], field: str | None, ascii_only: bool) -> None:
    """The same records as a list and one a line are the same tokens."""

    def written(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=ascii_only)
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    (tmp_path / "a.json").write_text(written(records), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(written(r) + "\n" for r in records), encoding="utf-8")
    (tmp_path / "a.txt").write_text(written(records), encoding="utf-8")
    read(tmp_path / "a.txt")
    document, lines = read(tmp_path / "a.json", field), read(tmp_path / "a.jsonl", field)
    if len(records) > 1 or not any(isinstance(r, list) for r in records):  # a single list is a list of records
        assert (document and document.sha256) == (lines and lines.sha256)


@BOUNDED
@given(value=VALUES, field=FIELDS)
def test_any_json(tmp_path: Path, value: Any, field: str | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    read(path, field)


@BOUNDED
@given(
    rows=st.lists(
        st.lists(st.text(max_size=6) | st.sampled_from(["text", "w5 w6", 'a "b", c\n']), max_size=3), max_size=5
    ),
    cut=st.integers(0, 40),
)
def test_any_rows(tmp_path: Path, rows: list[list[str]], cut: int) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    path = tmp_path / "a.csv"
    path.write_text(stream.getvalue().encode("utf-8", "replace").decode()[cut:], encoding="utf-8", newline="")
    read(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_any_flipped_byte_of_a_table(kind: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table, path = pyarrow.table({"text": ["w5 w6 w7"] * 20}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        read(path)
        path.write_bytes(content[:at])
        read(path)
