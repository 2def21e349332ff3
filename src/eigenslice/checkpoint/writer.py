"""Writing a result beside its final place, and moving it there when it is complete."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenslice.checkpoint.weights import INDEX, SINGLE
from eigenslice.errors import OutputError

GIB = 1024**3


def check_output(output: Path) -> None:
    """Refuse an output folder that exists, or whose parent isn't a folder.

    Raises:
        OutputError.
    """
    try:
        exists = output.exists()
    except OSError as error:
        raise OutputError(
            f"{output} can't be a folder ({error.strerror})",
            allowed="a name that the file system takes",
            next_step="choose another --output",
        ) from error
    if exists:
        raise OutputError(
            f"{output} exists already",
            allowed="a name that is free: eigenslice never writes into an existing folder",
            next_step="choose another --output, or remove this one",
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(
            f"{parent} is not a folder",
            allowed="an output path below a folder",
            next_step="choose another --output",
        )


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name `output` when the body succeeds, and vanishes when it fails."""
    check_output(output)
    parent = output.absolute().parent
    created = [p for p in (parent, *parent.parents) if not p.exists()]
    temporary = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}-", dir=parent))
        check_output(output)  # with its parent there, the file system also judges its name
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide the result from the user's group
        yield temporary
        check_output(output)
        temporary.rename(output)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise OutputError(
                f"writing {output} failed: {error}",
                allowed="a folder with enough free space and the right to write",
                next_step="free space or choose another --output",
            ) from error
        raise


class ShardWriter:
    """Writes tensors in the order in which they come, a new file whenever one is full.

    Only what was announced may be written, and all of it must be.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        shard_bytes: int,
        in_float32: frozenset[str] = frozenset(),
    ) -> None:
        """in_float32: names of those that are stored in float32, whatever the others are in."""
        self._folder, self._expected, self._dtype = folder, dict(shapes), dtype
        self._in_float32 = in_float32
        self._limit = shard_bytes
        self._buffer: dict[str, Tensor] = {}
        self._size = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, in any dtype and on any device.

        Raises:
            ValueError: it wasn't announced, has another shape, or doesn't fit the stored dtype.
        """
        expected = self._expected.pop(name, None)
        if expected != tuple(tensor.shape):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, announced was {expected}")
        dtype = torch.float32 if name in self._in_float32 else self._dtype
        stored = tensor.to(device="cpu", dtype=dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise OutputError(
                f"{name} doesn't fit into {str(dtype).removeprefix('torch.')}: NaN or infinite numbers",
                allowed="a dtype that holds every weight",
                next_step="pass --dtype bfloat16 or --dtype float32",
            )
        size = stored.numel() * stored.element_size()
        if self._buffer and self._size + size > self._limit:
            self._flush()
        self._buffer[name] = stored
        self._size += size
        self.total_bytes += size

    def _shard_name(self, index: int) -> Path:
        return self._folder / f".shard-{index}.safetensors"

    def _flush(self) -> None:
        shard = self._shard_name(len(self._shards))
        save_file(self._buffer, shard, metadata={"format": "pt"})
        shard.chmod(0o644)  # safetensors writes files that only their owner can read
        self._shards.append(list(self._buffer))
        self._buffer, self._size = {}, 0

    def finish(self) -> None:
        """Write the last shard and the index, under the names that transformers looks for.

        Raises:
            ValueError: tensors are missing.
        """
        if self._expected:
            raise ValueError(f"never written: {sorted(self._expected)[:5]}")
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard_name(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard_name(index).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self._folder / INDEX, content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as transformers does: two spaces, a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
