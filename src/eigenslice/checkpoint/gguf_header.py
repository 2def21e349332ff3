"""The header of a GGUF file, read within bounds: every length in it is compared with the file before it is used.

Readers of gguf and transformers trust these lengths, and ask for terabytes, or read other tensors' bytes.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from eigenslice.errors import CheckpointError, first_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letters for the types of metadata that have a fixed size."""
STRING, ARRAY = 8, 9
LONGEST_NAME = 2**16 - 1
MOST_DIMENSIONS = 4
ALIGNMENT = "general.alignment"
ARCHITECTURE = "general.architecture"
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
BLOCK = re.compile(r"blk\.(\d{1,9})\.")


def _can_be_read(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


READABLE = frozenset(kind for kind in GGMLQuantizationType if _can_be_read(kind))
"""Types of tensors that the package gguf dequantizes."""


class HeaderError(ValueError):
    """A fault of a header."""


@dataclass(frozen=True)
class GgufTensor:
    """The place and the form of a tensor in the file.

    Attributes:
        kind: Storage type of the numbers.
        shape: Shape in numbers, rows first.
        start, size: First byte in the file, and number of bytes.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file.

    Attributes:
        fields: The metadata.
        tensors: The tensors, by name.
    """

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return self.fields[ARCHITECTURE]

    def of_architecture(self, name: str) -> Any:
        """Return a field that begins with the architecture's name; None if there is none."""
        return self.fields.get(f"{self.architecture}.{name}")

    @property
    def numbers(self) -> int:
        """Count of numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_header(path: Path) -> GgufHeader:
    """Read and check a GGUF file's header. The headers of the last two files are kept, as the files were then.

    Raises:
        CheckpointError: the file is broken, or one part of several.
    """
    status = path.stat() if path.exists() else None
    return _read_header(path, status and (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=2)
def _read_header(path: Path, stamp: tuple[int, int, int] | None) -> GgufHeader:
    if (parts := PART.search(path.name)) and int(parts[1]) > 1:
        raise _split(path, int(parts[1]))
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data).header()
    except (HeaderError, OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
        reason = str(error) if isinstance(error, HeaderError) else first_line(error)
        raise CheckpointError(
            f"{path} is not a readable GGUF file: {reason}",
            allowed="a complete GGUF file of version 2 or 3",
            next_step="download or convert this file again",
        ) from error
    count = header.fields.get("split.count")
    if isinstance(count, int) and count > 1:
        raise _split(path, count)
    return header


def _split(path: Path, count: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is one of {count} parts of a GGUF file",
        allowed="a GGUF in one file",
        next_step="merge the parts: llama-gguf-split --merge FIRST_PART MERGED.gguf",
    )


class _Reader:
    """Reads values one after the other, never behind the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise HeaderError("it doesn't begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise HeaderError(f"its version is {version}" + (": it is big-endian" if not version & 0xFFFF else ""))
        tensors, fields = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(fields, 12, "metadata fields")):
            name = self._name("a metadata field")
            if name in metadata:
                raise HeaderError(f"it has the field {name!r} twice")
            metadata[name] = self._value(self._number("I"))
        alignment = _alignment(metadata)
        entries = [self._entry() for _ in range(self._count(tensors, 24, "tensors"))]
        start = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, self._placed(entries, start, alignment))

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise HeaderError(f"it ends at byte {self._size}, where {count} bytes from {self._at} on should be")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self._take(struct.calcsize("<" + letter)))[0]

    def _count(self, count: int, least: int, what: str) -> int:
        """A number of things that take at least so many bytes each, if the file has room for them."""
        if count * least > self._size - self._at:
            raise HeaderError(f"it announces {count} {what}, for which it is too short")
        return count

    def _string(self) -> str:
        return self._take(self._count(self._number("Q"), 1, "characters")).decode("utf-8", errors="strict")

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if not 0 < length <= LONGEST_NAME:
            raise HeaderError(f"the name of {what} has {length} bytes")
        return self._take(length).decode("utf-8", errors="strict")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise HeaderError(f"it has a field of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            size = struct.calcsize("<" + SCALARS[inner])
            values = self._take(self._count(count, size, "elements of an array") * size)
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", values))
        if inner != STRING:
            raise HeaderError(f"it has an array of elements of type {inner}")
        return [self._string() for _ in range(self._count(count, 8, "elements of an array"))]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name, dimensions = self._name("a tensor"), self._number("I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise HeaderError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        if not all(shape) or math.prod(shape) > 2**62:
            raise HeaderError(f"tensor {name!r} has the shape {shape[::-1]}")
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors in their order, if each has bytes of its own in the file."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise HeaderError(f"it has the tensor {name!r} twice")
            kind, size = _stored(name, shape, number)
            if offset % alignment:
                raise HeaderError(f"tensor {name!r} begins at {offset}, which isn't a multiple of {alignment}")
            if start + offset + size > self._size:
                raise HeaderError(f"tensor {name!r} ends behind the end of the file: it is cut off")
            tensors[name] = GgufTensor(kind, shape, start + offset, size)
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise HeaderError(f"the tensors {before!r} and {name!r} overlap")
            end, before = tensor.start + tensor.size, name
        return tensors


def _alignment(metadata: dict[str, Any]) -> int:
    architecture, alignment = metadata.get(ARCHITECTURE), metadata.get(ALIGNMENT, 32)
    if not isinstance(architecture, str) or not architecture:
        raise HeaderError(f"it has no {ARCHITECTURE}")
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise HeaderError(f"its {ALIGNMENT} is {alignment!r}")
    return alignment


def _stored(name: str, shape: tuple[int, ...], number: int) -> tuple[GGMLQuantizationType, int]:
    """A tensor's type and size in bytes."""
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise HeaderError(f"tensor {name!r} has the unknown type {number}") from None
    if kind not in READABLE:
        raise HeaderError(f"tensor {name!r} is stored as {kind.name}, which can't be dequantized")
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % per_block:
        raise HeaderError(f"tensor {name!r} has rows of {shape[-1]} numbers, {kind.name} has blocks of {per_block}")
    return kind, math.prod(shape) // per_block * block_bytes
