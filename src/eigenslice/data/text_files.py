"""Files of text: finding a file by its name, recognizing its bytes, and streaming its characters."""

import bz2
import codecs
import gzip
import lzma
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from eigenslice.data.presets import ALLOWED as ALLOWED_DATA
from eigenslice.errors import CalibrationError, first_line

CHUNK = 2**20  # bytes
HEAD = 4096  # bytes at the start of a file that show its kind
KINDS = {
    ".json": "json",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
PACKED_START = {
    "gzip": rb"\x1f\x8b",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd",
}
TABLE_START = {"parquet": rb"PAR1", "arrow": rb"ARROW1|\xff\xff\xff\xff"}
BINARY_NAMES = {
    "an archive": ".zip .tar .tgz .7z .rar .whl .jar",
    "a pickle": ".pkl .pickle .pt .pth .ckpt .joblib",
    "an array": ".npy .npz",
    "weights": ".bin .gguf .ggml .onnx .safetensors",
    "an image": ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico",
    "a document": ".pdf .doc .docx .odt .rtf .xls .xlsx .ods .ppt .pptx .epub",
    "sound or video": ".mp3 .wav .flac .ogg .mp4 .avi .mkv .webm .mov",
    "a database": ".db .sqlite .sqlite3",
    "a program": ".exe .dll .so .pyc",
    "a binary table": ".h5 .hdf5 .orc .avro .msgpack .tfrecord",
}
BINARY_STARTS = {
    "a zip archive, or a document in one": rb"PK(\x03\x04|\x05\x06)",
    "an archive": rb"7z\xbc\xaf|Rar!|.{257}ustar",
    "a pickle": rb"\x80[\x02-\x05]",
    "an array": rb"\x93NUMPY",
    "a GGUF file": rb"GGUF",
    "an image": rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP",
    "sound or video": rb"OggS|fLaC|RIFF....(WAVE|AVI )",
    "a PDF document": rb"%PDF-",
    "an Office document": rb"\xd0\xcf\x11\xe0",
    "a binary table": rb"\x89HDF|Obj\x01|FEA1",
    "a database": rb"SQLite format 3",
    "a program": rb"\x7fELF",
}
MARKS = {  # byte order marks; the longer one first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UTF_8 = "utf-8-sig"  # a byte order mark is left out, where there is one
ALLOWED = (
    "UTF-8 text; .json with a list of strings or records; .jsonl with one of these a line; .csv or .tsv with a header; "
    "these in .gz, .bz2, .xz or .zst; .parquet or .arrow"
)


@dataclass(frozen=True)
class TextFile:
    """A file that can be read.

    Attributes:
        path: Path of the file.
        kind: "text", or a kind of KINDS.
        suffix: Suffix of the name, in lower case, without the suffix of a packing.
        packing: A packing of PACKED, "" for none.
        encoding: Encoding of the characters.
    """

    path: Path
    kind: str
    suffix: str
    packing: str
    encoding: str

    def characters(self, newline: str | None) -> TextIOWrapper:
        """A stream of its characters; newline as `open` takes it."""
        return TextIOWrapper(cast(Any, _unpacked(self.path, self.packing)), encoding=self.encoding, newline=newline)


def local_path(data: str) -> Path | None:
    """The file or folder of this name; None if nothing is there and the name may be one of the hub.

    A name with a colon may be a folder's with a configuration and a split, so that one that isn't there is None, too.

    Raises:
        CalibrationError: a path that isn't there or can't be reached, or no file: a pipe, a device.
    """
    if not data.strip():
        raise _absent(repr(data), "names no text")
    if not data.isascii() and data.encode("utf-8", "replace").decode() != data:
        raise _absent(data, "isn't a name in UTF-8, in which results record it", "rename the file")
    try:
        path = Path(data).expanduser()
    except RuntimeError:  # ~nobody
        path = Path(data)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise _absent(data, f"is a link to {path.readlink()}, which doesn't exist") from None
        if (":" not in data or "\\" in data) and _looks_local(data):
            raise _absent(data, "doesn't exist") from None
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not isinstance(error, PermissionError) and not _looks_local(data):
            return None  # such as a name of 300 characters
        raise _absent(data, f"can't be read ({first_line(error)})") from error
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for test, name in kinds if test(mode)), "a device")
    raise _absent(data, f"is {kind}", "write what it gives into a file")


def _looks_local(data: str) -> bool:
    """Return whether a name is a path and no hub data set, NAME or OWNER/NAME."""
    name = data if "\\" in data else data.partition(":")[0]
    known = {*KINDS, *PACKED, ".txt", ".md", ".safetensors", *" ".join(BINARY_NAMES.values()).split()}
    return (
        name.startswith(("/", "./", "../", "~"))
        or name.endswith("/")
        or name in (".", "..")
        or name.count("/") > 1
        or "\\" in name
        or Path(name).suffix.lower() in known
    )


def _absent(data: str, what: str, next_step: str = "check the path") -> CalibrationError:
    kind = "file " if what == "doesn't exist" else ""
    return CalibrationError(f"{kind}{data} {what}", allowed=ALLOWED_DATA, next_step=next_step)


def open_file(path: Path) -> TextFile:
    """Recognize the kind of a file by its name and its first bytes.

    Raises:
        CalibrationError: it isn't text, or can't be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    wanted = PACKED.get(suffixes[-1], "") if suffixes else ""
    suffix = (["", *suffixes][-2] if wanted else suffixes[-1]) if suffixes else ""
    with reading(path):
        with path.open("rb") as stream:
            start = stream.read(HEAD)
        packing = next((name for name, pattern in PACKED_START.items() if re.match(pattern, start)), "")
        if start and wanted and packing != wanted:
            raise refused(path, f"is named {path.suffix} and isn't packed by {wanted}")
        if packing:
            with _unpacked(path, packing) as stream:
                start = stream.read(HEAD)
    kind = KINDS.get(suffix, "text")
    table = next((name for name, pattern in TABLE_START.items() if re.match(pattern, start)), None)
    if table and not packing:
        return TextFile(path, table, suffix, "", UTF_8)
    binary = _binary(suffix, start) or (table and f"{table}, which is packed as it is, in {packing}")
    if kind in TABLE_START and start and not binary:
        binary = f"named {suffix}, and isn't {kind}"
    if binary:
        raise refused(path, f"is no text: it is {binary}")
    return TextFile(path, kind, suffix, packing, _encoding(start))


def _binary(suffix: str, start: bytes) -> str | None:
    """Return the kind of a file that isn't text, by its start or its name; None if it may be text."""
    for kind, pattern in BINARY_STARTS.items():
        if re.match(pattern, start, re.DOTALL):
            return kind
    for kind, suffixes in BINARY_NAMES.items():
        if suffix in suffixes.split():
            return f"{kind} by its name, {suffix}"
    return "a binary file, with NUL bytes" if b"\0" in start and _encoding(start) == UTF_8 else None


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), UTF_8)


def _unpacked(path: Path, packing: str) -> IO[bytes]:
    if packing == "zstd":
        import pyarrow

        return cast(IO[bytes], BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))
    openers: dict[str, Any] = {"": open, "gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers[packing](path, "rb")


@contextmanager
def reading(path: Path, file: TextFile | None = None) -> Iterator[None]:
    """Translate whatever reading a file raises.

    Raises:
        CalibrationError: instead.
    """
    try:
        yield
    except CalibrationError:
        raise
    except UnicodeDecodeError as error:
        place = _undecodable(file) if file else first_line(error)
        raise refused(path, f"can't be read: it isn't {_named(error.encoding)} at {place}") from error
    except Exception as error:  # the system, packings, csv and pyarrow raise their own
        raise refused(path, f"can't be read ({first_line(error)})") from error


def refused(path: Path, what: str, next_step: str = "check the file's encoding and format") -> CalibrationError:
    """The error of a file that can't be used."""
    return CalibrationError(f"{path} {what}", allowed=ALLOWED, next_step=next_step)


def _named(encoding: str) -> str:
    return "UTF-8" if encoding in ("utf-8", UTF_8) else encoding.upper()


def _undecodable(file: TextFile) -> str:
    """The place of the first bytes that aren't in a file's encoding: its line and byte, both counted from 1."""
    encoding = "utf-8" if file.encoding == UTF_8 else file.encoding
    decoder = codecs.getincrementaldecoder(encoding)()
    line, offset = 1, 0
    with _unpacked(file.path, file.packing) as stream:
        while True:
            chunk = stream.read(CHUNK)
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, "ignore").count("\n")
                return f"line {line}, byte {offset + len(chunk) - len(error.object) + error.start + 1}"
            offset += len(chunk)
            if not chunk:
                return f"line {line}"
