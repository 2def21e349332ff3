"""The package gguf's view of a file, made from a header that was read already.

transformers reads most GGUF files by this package, which makes several arrays for each word of the vocabulary. For the
262,000 words of Gemma 3 this takes 12 seconds, and again for the tokenizer and for the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from eigenslice.checkpoint.gguf_header import GgufTensor, read_header

KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.INT64,
    float: GGUFValueType.FLOAT64,
    str: GGUFValueType.STRING,
}
"""The type that transformers takes a value's bytes for."""

PACKAGE_READER = gguf.GGUFReader


@dataclass(frozen=True)
class Field:
    """A field of the metadata, as `gguf.ReaderField`.

    Attributes:
        parts: The name's length, the name, and each value.
        data: Places of the values in `parts`.
        types: Type of the values, behind ARRAY if there may be several.
    """

    parts: list[Any]
    data: list[int]
    types: list[GGUFValueType]

    @classmethod
    def of(cls, name: str, value: Any) -> "Field":
        """Return the field with a value of Python's."""
        values = value if isinstance(value, list) else [value]
        kind = KINDS[type(values[0])] if values else GGUFValueType.INT64
        types = [GGUFValueType.ARRAY, kind] if isinstance(value, list) else [kind]
        parts = [np.array([len(name)], np.uint64), name.encode()]
        parts += [one.encode() if isinstance(one, str) else (one,) for one in values]
        return cls(parts, list(range(2, len(parts))), types)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, as `gguf.ReaderTensor`: its numbers are read when they are asked for."""

    name: str
    tensor_type: GGMLQuantizationType
    path: Path
    stored: GgufTensor

    @property
    def data(self) -> np.ndarray:
        """The numbers, or rows of blocks."""
        return stored_numbers(self.path, self.stored)


class HeaderReader:
    """A reader as `gguf.GGUFReader`, of which transformers uses the fields and the tensors."""

    def __init__(self, path: str | Path) -> None:
        header = read_header(Path(path))
        self.fields = {name: Field.of(name, value) for name, value in header.fields.items()}
        self.tensors = [StoredTensor(name, t.kind, Path(path), t) for name, t in header.tensors.items()]


@contextmanager
def headers_read_once() -> Iterator[None]:
    """Let transformers take the header that was read already, where it would read it by the package gguf.

    The package's reader is there again behind the last of several uses, nested or in threads: an earlier end only
    means that transformers reads by the package.
    """
    gguf.GGUFReader = HeaderReader  # pyright: ignore[reportAttributeAccessIssue]: as much of it as is used
    try:
        yield
    finally:
        gguf.GGUFReader = PACKAGE_READER


def stored_as(tensor: GgufTensor) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the numpy type and shape of a tensor's bytes: numbers, or rows of blocks."""
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if tensor.kind in plain:
        return np.dtype(plain[tensor.kind]), tensor.shape
    rows = tensor.shape[:-1]
    return np.dtype(np.uint8), (*rows, tensor.size // int(np.prod(rows, dtype=np.int64)))


def stored_numbers(path: Path, tensor: GgufTensor) -> np.ndarray:
    """Return a tensor's numbers, or rows of blocks, in the file."""
    dtype, shape = stored_as(tensor)
    return np.memmap(path, dtype, "r", tensor.start, shape)
