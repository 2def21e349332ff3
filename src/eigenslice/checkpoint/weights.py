"""Reading tensors one at a time, by name; nothing is unpickled and nothing is read before it is asked for."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eigenslice.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Weights(Protocol):
    """Tensors by name."""

    files: tuple[Path, ...]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | None:
        """The tensor's dtype, None if it is none that can be sliced (integers, 8-bit floats)."""
        ...

    def load(self, name: str) -> Tensor: ...

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The tensor in pieces of so many rows: a vocabulary's matrix may be larger than all else."""
        ...


def file_hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    digests = {}
    for file in files:
        with file.open("rb") as handle:
            digests[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests


def _broken(file: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a readable safetensors file: {why}",
        allowed="safetensors files as transformers and safetensors write them, complete and unchanged",
        next_step="download or save this file again",
    )


def _read_index(folder: Path) -> dict[str, str]:
    """The weight map of a sharded checkpoint; every shard must lie in the folder."""
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a shard index ({type(error).__name__}: {error})",
            allowed='JSON with a "weight_map" from tensor names to file names',
            next_step="download or save the checkpoint again",
        ) from error
    outside = sorted({shard for shard in shards.values() if Path(shard).name != shard})
    if outside:
        raise CheckpointError(
            f"{path} points outside of its folder: {', '.join(outside[:3])}",
            allowed="file names in the checkpoint's own folder",
            next_step="download or save the checkpoint again",
        )
    missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(set(shards.values()))} weight files its index names: "
            + ", ".join(missing[:3]),
            allowed="a complete checkpoint",
            next_step="download the missing files",
        )
    return shards


class SafetensorsWeights:
    """Tensors of one safetensors file or of a sharded checkpoint.

    Raises:
        CheckpointError: no weights, a broken file, a missing shard, or an index that points elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            index = _read_index(folder)
            self.files = tuple(folder / shard for shard in sorted(set(index.values())))
        elif (folder / SINGLE).is_file():
            index, self.files = None, (folder / SINGLE,)
        else:
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            found = f", only {', '.join(pickles[:3])}, and pickles can run code" if pickles else ""
            raise CheckpointError(
                f"{folder} has no {SINGLE} and no {INDEX}{found}",
                allowed="safetensors weights",
                next_step="save the checkpoint as safetensors: load it with transformers and save_pretrained it"
                if pickles
                else "pass a folder with a complete checkpoint",
            )
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        header = tensors.get_slice(name)
                        self._file_of[name] = file
                        self._headers[name] = (tuple(header.get_shape()), header.get_dtype())
            except (SafetensorError, OSError) as error:
                raise _broken(file, error) from error
        for name, shard in (index or {}).items():
            if self._file_of.get(name) != folder / shard:
                raise _broken(folder / shard, f"it lacks tensor {name!r}, which the index promises")

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype | None:
        return SAFETENSORS_DTYPES.get(self._headers[name][1])

    def load(self, name: str) -> Tensor:
        """The tensor, copied: pages of a mapped file count as this process's memory for as long as it is mapped."""
        try:
            with safe_open(self._file_of[name], framework="pt") as tensors:
                return tensors.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise _broken(self._file_of[name], error) from error

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The tensor in pieces of so many rows, each copied."""
        for start in range(0, self.shape(name)[0], count):
            try:
                with safe_open(self._file_of[name], framework="pt") as tensors:
                    piece = tensors.get_slice(name)[start : start + count].clone()
            except (SafetensorError, OSError) as error:
                raise _broken(self._file_of[name], error) from error
            yield piece
