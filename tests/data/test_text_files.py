"""Which file a name means, and what a file's bytes are."""

import bz2
import gzip
import lzma
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from eigenslice.data.text_files import KINDS, local_path, open_file, reading
from eigenslice.errors import CalibrationError
from tests.messages import check_message

TEXT = "größer\nals\n"


def zstd(content: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def content(path: Path) -> str:
    opened = open_file(path)
    with reading(path, opened), opened.characters(newline=None) as stream:
        return stream.read()


def refused(path: Path) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        content(path)
    return caught.value


def unreachable(data: str) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        local_path(data)
    return caught.value


@pytest.mark.parametrize(("suffix", "kind"), KINDS.items())
def test_kinds_are_told_by_names_in_any_case(suffix: str, kind: str, tmp_path: Path) -> None:
    start = {"parquet": b"PAR1", "arrow": b"ARROW1"}.get(kind, b"[]")
    assert {open_file(file(tmp_path, f"a{s}", start)).kind for s in (suffix, suffix.upper())} == {kind}


@pytest.mark.parametrize("suffix", PACKINGS)
@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.csv", "a.txt"])
def test_packed_files_are_what_is_in_them(name: str, suffix: str, tmp_path: Path) -> None:
    packed = file(tmp_path, name + suffix, PACKINGS[suffix](TEXT.encode()))
    plain = file(tmp_path, name, TEXT.encode())
    assert open_file(packed).kind == open_file(plain).kind
    assert content(packed) == content(plain) == TEXT


@pytest.mark.parametrize("suffix", PACKINGS)
def test_packings_are_told_by_content(suffix: str, tmp_path: Path) -> None:
    assert content(file(tmp_path, "a.jsonl", PACKINGS[suffix](TEXT.encode()))) == TEXT
    check_message(refused(file(tmp_path, f"a.json{suffix}", TEXT.encode())), f"a.json{suffix}", "isn't packed by")


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_packed_file_that_ends_too_soon_is_refused(suffix: str, tmp_path: Path) -> None:
    packed = PACKINGS[suffix](os.urandom(20_000).hex().encode())
    check_message(refused(file(tmp_path, f"a.txt{suffix}", packed[: len(packed) // 2])), "can't be read")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_no_text(encoding: str, tmp_path: Path) -> None:
    assert content(file(tmp_path, "a.txt", TEXT.encode(encoding))) == TEXT


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.txt", b"PK\x03\x04rest", "zip archive"),
        ("a.jsonl", b"GGUF\x03\0\0\0", "GGUF"),
        ("a", b"\x89PNG\r\n\x1a\n", "an image"),
        ("a.md", b"%PDF-1.7\n", "a PDF"),
        ("a.txt", pickle.dumps({"a": 1}), "a pickle"),
        ("a.pkl", pickle.dumps({"a": 1}, protocol=0), "a pickle by its name, .pkl"),
        ("a.NPY", b"\x93NUMPY", "an array"),
        ("a.bin", b"text", "weights by its name, .bin"),
        ("a.docx", b"text", "a document by its name"),
        ("a.txt", b"text\0text", "NUL"),
        ("a.txt", "text".encode("utf-16-le"), "NUL"),
        ("a.tar.gz", gzip.compress(b"a" * 257 + b"ustar", mtime=0), "an archive"),
        ("a.json.gz", gzip.compress(gzip.compress(b"[]" * 99, mtime=0), mtime=0), "NUL"),
        ("a.parquet.gz", gzip.compress(b"PAR1 PAR1", mtime=0), "parquet"),
        ("a.parquet", b"text", "isn't parquet"),
    ],
)
def test_what_is_no_text_is_refused_by_name_and_kind(name: str, start: bytes, kind: str, tmp_path: Path) -> None:
    check_message(refused(file(tmp_path, name, start)), str(tmp_path / name), kind)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("lines", [2, 300_000])
def test_the_place_of_what_is_not_utf_8_is_told(lines: int, suffix: str, tmp_path: Path) -> None:
    written = b"word\n" * lines + b"abc \xe4 word\n"
    path = file(tmp_path, f"a.txt{suffix}", gzip.compress(written) if suffix else written)
    check_message(refused(path), f"isn't UTF-8 at line {lines + 1}, byte {5 * lines + 5}")


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a.txt"[:1]) == tmp_path
    assert local_path("~") == tmp_path
    assert local_path(f"~/{file(tmp_path, 'a.txt', b'text').name}") == tmp_path / "a.txt"


@pytest.mark.parametrize(
    "data",
    [
        "none.txt",
        "none.JSONL",
        "none.safetensors",
        "owner/none.parquet",
        "./none",
        "../none",
        "/none",
        "~/none",
        "~nobody-of-this-name/none",
        "a/b/c",
        "none/",
        "C:\\none",
    ],
)
def test_paths_that_are_not_there_are_not_looked_for_elsewhere(
    data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check_message(unreachable(data), f"file {data} doesn't exist")


@pytest.mark.parametrize("data", ["owner/name", "name", "owner/name:config:train", "x" * 300])
def test_other_names_may_be_data_sets(data: str) -> None:
    assert local_path(data) is None


def test_a_name_that_is_not_in_utf_8_is_refused_before_the_work(tmp_path: Path) -> None:
    path = file(tmp_path, os.fsdecode(b"\xff.txt"), b"text")
    check_message(unreachable(str(path)), "isn't a name in UTF-8")


@pytest.mark.parametrize("data", ["", " ", "a\0b", "\ud800", "/" + "x" * 300])
def test_what_names_nothing_is_refused(data: str) -> None:
    unreachable(data)


@pytest.mark.parametrize("name", ["pipe", "pipe.txt", "pipe.safetensors"])
def test_pipes_and_devices_are_refused_and_not_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    check_message(unreachable(str(tmp_path / name)), name, "is a pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    check_message(unreachable(str(tmp_path / "zero")), "is a device")


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    check_message(unreachable(str(tmp_path / "loop.txt")), "loop.txt", "symbolic links")
    (tmp_path / "link.txt").symlink_to("nowhere.txt")
    check_message(unreachable(str(tmp_path / "link.txt")), "link.txt", "is a link to nowhere.txt, which doesn't exist")


def test_what_may_not_be_read_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", b"text")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    check_message(refused(path), "a.txt", "Permission denied")
    monkeypatch.setattr(Path, "stat", denied)
    check_message(unreachable(str(path)), "a.txt", "Permission denied")
