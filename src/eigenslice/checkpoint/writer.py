"""Writing tensors into safetensors files; the layout is known before the first tensor comes."""

import hashlib
import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.finite import all_finite
from eigenslice.checkpoint.weights import INDEX, SAFETENSORS_DTYPES, SINGLE
from eigenslice.errors import ActivationError, IncompleteError
from eigenslice.runtime.durable import NOFOLLOW, flush
from eigenslice.runtime.output import WEIGHT_FILE
from eigenslice.runtime.progress import MIB, Progress, no_progress

GIB = 1024**3
CHECKING_STAGE = "checking"
"""Stage of the run in which the result is read back; its steps are MiB."""
CHUNK = 1 << 24  # bytes read at once when files are verified
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    """The place of a tensor's bytes."""

    file: str
    start: int
    size: int


class ShardWriter:
    """A writer of tensors, in any order, each at its place in its file; nothing is kept in memory.

    Exactly the announced tensors must be written. A tensor may be written again, because an interrupted run repeats the
    work after its last saved state.

    Attributes:
        folder: The folder of the files.
        dtype: The dtype of all tensors.
        total_bytes: Size of all tensors in bytes.
        checksums: CRC-32 of each tensor written, by name.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        shard_bytes: int,
        in_float32: frozenset[str] = frozenset(),
    ) -> None:
        """Nothing is written yet.

        Args:
            folder: The folder of the files; they have the names that transformers looks for.
            shapes: Shapes of all tensors, in the order of their layout.
            dtype: The dtype of the tensors.
            shard_bytes: Largest size of a file; a file with a single tensor may be larger.
            in_float32: Names of tensors that are stored in float32, in any case.
        """
        self.folder, self._shapes, self.dtype = folder, dict(shapes), dtype
        self._in_float32 = in_float32
        sizes = {name: math.prod(shape) * self._dtype_of(name).itemsize for name, shape in shapes.items()}
        self.total_bytes = sum(sizes.values())
        self.checksums: dict[str, int] = {}
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, _Place] = {}
        for index, names in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            self._headers[file] = self._lay_out(file, {name: sizes[name] for name in names})

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._in_float32 else self.dtype

    def _lay_out(self, file: str, sizes: dict[str, int]) -> bytes:
        """A file's header: its length in 8 bytes, then JSON, padded so that the data start at a multiple of 8."""
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in sorted(sizes.items(), key=lambda item: -self._dtype_of(item[0]).itemsize):  # to stay aligned
            content[name] = {
                "dtype": DTYPE_NAMES[self._dtype_of(name)],
                "shape": list(self._shapes[name]),
                "data_offsets": [end, end + size],
            }
            end += size
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name in sizes:
            first, last = content[name]["data_offsets"]
            self._places[name] = _Place(file, start + first, last - first)
        return len(text).to_bytes(8, "little") + text

    def begin(self) -> None:
        """Take the space on the disk, and write the headers; weight files of another layout are removed.

        Raises:
            IncompleteError: there isn't enough.
        """
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if WEIGHT_FILE.fullmatch(path.name) and not self._has_header(path):
                path.unlink()
        sizes = {file: len(header) for file, header in self._headers.items()}
        for place in self._places.values():
            sizes[place.file] = max(sizes[place.file], place.start + place.size)
        check_space(self.folder, sum(size for file, size in sizes.items() if not (self.folder / file).exists()))
        for file, header in self._headers.items():
            descriptor = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | NOFOLLOW, 0o644)
            try:
                os.pwrite(descriptor, header, 0)
                os.ftruncate(descriptor, sizes[file])
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, sizes[file])
            finally:
                os.close(descriptor)

    def _has_header(self, path: Path) -> bool:
        header = self._headers.get(path.name)
        if header is None:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any dtype and any device.

        Raises:
            ValueError: it wasn't announced or has another shape.
            IncompleteError: it doesn't fit the stored dtype.
            ActivationError: it has NaN or infinite numbers.
        """
        expected = self._shapes.get(name)
        if expected != tuple(tensor.shape):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, announced was {expected}")
        dtype = self._dtype_of(name)
        stored = tensor.to(dtype=dtype).cpu().contiguous()
        if not all_finite(stored):
            raise _unfit(name, tensor, dtype)
        place = self._places[name]
        data = stored.reshape(-1).view(torch.uint8).numpy().data
        descriptor = os.open(self.folder / place.file, os.O_WRONLY | NOFOLLOW)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], place.start + done)
        finally:
            os.close(descriptor)
        self.checksums[name] = zlib.crc32(data)

    def flushed(self) -> dict[str, int]:
        """Checksums of the tensors written so far, once the tensors are on the disk."""
        for file in self._headers:
            flush(self.folder / file)
        return dict(self.checksums)

    def holds(self, checksums: dict[str, int]) -> bool:
        """Return whether the files hold these tensors as they were written."""
        return all(self._checksum(name) == checksum for name, checksum in checksums.items())

    def _checksum(self, name: str) -> int | None:
        place = self._places.get(name)
        if place is None:
            return None
        checksum, left = 0, place.size
        with (self.folder / place.file).open("rb") as handle:
            handle.seek(place.start)
            while left and (data := handle.read(min(CHUNK, left))):
                checksum, left = zlib.crc32(data, checksum), left - len(data)
        return None if left else checksum

    def finish(self, progress: Progress = no_progress) -> dict[str, str]:
        """Write the index, and read everything back.

        Args:
            progress: Called after each file, with MiB.

        Returns:
            SHA-256 of each file.

        Raises:
            ValueError: tensors are missing.
            IncompleteError: a tensor isn't there as it was written.
        """
        missing = sorted(set(self._shapes) - set(self.checksums))
        if missing:
            raise ValueError(f"never written: {missing[:5]}")
        hashes: dict[str, str] = {}
        done, total = 0, sum((self.folder / file).stat().st_size for file in self._headers)
        for file in self._headers:
            progress(CHECKING_STAGE, done // MIB, -(-total // MIB))
            hashes[file] = self._verify(file)
            done += (self.folder / file).stat().st_size
        progress(CHECKING_STAGE, -(-total // MIB), -(-total // MIB))
        if len(self._headers) > 1:
            weight_map = {name: place.file for name, place in self._places.items()}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        return hashes

    def _verify(self, file: str) -> str:
        digest = hashlib.sha256()
        with (self.folder / file).open("r+b") as handle:
            os.fsync(handle.fileno())
            header = handle.read(len(self._headers[file]))
            digest.update(header)
            wrong = [] if header == self._headers[file] else ["its header"]
            here = [(name, place) for name, place in self._places.items() if place.file == file]
            for name, place in sorted(here, key=lambda item: item[1].start):
                checksum, left = 0, place.size
                while left:
                    data = handle.read(min(CHUNK, left))
                    if not data:
                        break
                    digest.update(data)
                    checksum, left = zlib.crc32(data, checksum), left - len(data)
                if left or checksum != self.checksums[name]:
                    wrong.append(name)
            if handle.read(1):
                wrong.append("what comes behind the last tensor")
        if wrong:
            raise IncompleteError(
                f"{self.folder / file} is not as it was written: {', '.join(wrong[:3])}",
                allowed="a disk that keeps what is written",
                next_step="check the disk, remove this folder and slice again",
            )
        return digest.hexdigest()


def _unfit(name: str, tensor: Tensor, dtype: torch.dtype) -> IncompleteError | ActivationError:
    """The error of a tensor that can't be stored; it may come in the stored dtype, as infinity where it doesn't fit."""
    overflows = dtype != torch.float32 and tensor.dtype in (dtype, torch.float32, torch.float64)
    if bool(tensor.isnan().any()) or not (overflows and (tensor.dtype == dtype or all_finite(tensor))):
        return ActivationError(
            f"{name} has NaN or infinite numbers after slicing",
            allowed="finite numbers",
            next_step="run with --compute-dtype float32; report the model if that doesn't help",
        )
    return IncompleteError(
        f"{name} doesn't fit into {str(dtype).removeprefix('torch.')}, which holds numbers up to "
        f"{torch.finfo(dtype).max:.3g}",
        allowed="a dtype that holds every weight",
        next_step="run the same command with --resume --dtype bfloat16 (or float32): only the last pass is repeated",
    )


def check_space(folder: Path, needed: int) -> None:
    """Refuse a disk that hasn't this many bytes free.

    Args:
        folder: The folder to write to. The folder and its parents need not exist yet.
        needed: Number of bytes.

    Raises:
        IncompleteError: fewer bytes are free.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise IncompleteError(
            f"the result takes {needed / MIB:,.1f} MiB, and {folder} has {free / MIB:,.1f} MiB free",
            allowed="a disk with room for the result",
            next_step="free space (and add --resume if the run has begun), or choose another --output",
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON as transformers does: two spaces, a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
