"""Reading tensors one at a time, by name; nothing is unpickled and nothing is read before it is asked for."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eigenslice.checkpoint.files import LARGEST_JSON, check_file
from eigenslice.checkpoint.scan import Span, plain
from eigenslice.errors import CheckpointError, first_line
from eigenslice.runtime.reading import parsed_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LEFTOVERS = re.compile(
    r"(rotary_emb\.inv_freq|embed_positions\.weights|attn\.causal_mask|att(entio)?n\.(masked_)?bias)$"
)
"""Buffers that older versions of transformers stored beside the weights."""


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

    def spans(self, file: Path) -> list[Span]:
        """Return the places of the tensors in one of the files."""
        ...


def _broken(file: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a readable safetensors file: {why}",
        allowed="safetensors files as transformers and safetensors write them, complete and unchanged",
        next_step="download or save this file again",
    )


def _read_index(folder: Path) -> dict[str, str]:
    """The weight map of a sharded checkpoint; every shard must be a safetensors file in the folder.

    transformers asks for the metadata, too, and reads pickles that an index names.
    """
    path = folder / INDEX
    check_file(path, folder, LARGEST_JSON)
    try:
        content = parsed_json(path.read_text(encoding="utf-8"))
        shards = {str(name): str(shard) for name, shard in content["weight_map"].items()}
        dict(content["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a shard index ({first_line(error)})",
            allowed='JSON with "metadata" and a "weight_map" from tensor names to file names',
            next_step="download or save the checkpoint again",
        ) from error
    files = sorted(set(shards.values()))
    outside = [shard for shard in files if Path(shard).name != shard]
    if outside or not files:
        raise CheckpointError(
            f"{path} points outside of its folder: {', '.join(outside[:3])}" if files else f"{path} names no file",
            allowed="file names in the checkpoint's own folder",
            next_step="download or save the checkpoint again",
        )
    others = [shard for shard in files if not shard.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{path} names {', '.join(others[:3])}, which isn't safetensors; pickles can run code and are never read",
            allowed="safetensors weights",
            next_step="save the checkpoint as safetensors: load it with transformers and save_pretrained it",
        )
    missing = [shard for shard in files if not (folder / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files its index names: "
            + ", ".join(missing[:3]),
            allowed="a complete checkpoint",
            next_step="download the missing files",
        )
    return shards


def _find_index(folder: Path) -> dict[str, str] | None:
    """Return the valid weight map, None for a single file.

    transformers takes a single file if both are there. A folder keeps the old files when the other kind is saved over
    them, so the user may mean the shards.
    """
    if not (folder / INDEX).exists():
        return None
    if not (folder / SINGLE).exists():
        return _read_index(folder)
    check_file(folder / INDEX, folder, LARGEST_JSON)
    try:
        content = parsed_json((folder / INDEX).read_text(encoding="utf-8"))
        shards = {str(shard) for shard in content["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    beside = sorted(shard for shard in shards - {SINGLE} if (folder / Path(shard).name).exists())
    if beside:
        raise CheckpointError(
            f"{folder} holds weights twice: in {SINGLE}, and in the files of {INDEX} ({', '.join(beside[:3])})",
            allowed="one of the two",
            next_step=f"remove {SINGLE}, or {INDEX} and its files: transformers reads {SINGLE}",
        )
    return None


def _no_weights(folder: Path) -> CheckpointError:
    """Return the error for a folder without safetensors."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    ggufs = sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".gguf")
    others = f", only {', '.join((ggufs or pickles)[:3])}" if ggufs or pickles else ""
    step = "pass a folder with a complete checkpoint"
    if pickles:
        others += ", and pickles can run code" if not ggufs else ""
        step = "save the checkpoint as safetensors: load it with transformers and save_pretrained it"
    return CheckpointError(
        f"{folder} has no {SINGLE} and no {INDEX}{others}",
        allowed="safetensors weights",
        next_step=f"pass the GGUF file itself: {folder / ggufs[0]}" if ggufs else step,
    )


class SafetensorsWeights:
    """Tensors of one safetensors file or of a sharded checkpoint.

    Raises:
        CheckpointError: no weights, a broken file, a missing shard, or an index that points elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        index = _find_index(folder)
        if index is not None:
            self.files = tuple(folder / shard for shard in sorted(set(index.values())))
        elif (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
            self.files = (folder / SINGLE,)
        else:
            raise _no_weights(folder)
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in self.files:
            check_file(file, folder)
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        if name in self._file_of:
                            raise _broken(file, f"it has tensor {name!r}, which {self._file_of[name].name} has, too")
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

    def spans(self, file: Path) -> list[Span]:
        """Return the places of the tensors in one of the files; tensors of integers are left out."""
        with file.open("rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            header: dict[str, Any] = json.loads(handle.read(length))  # safetensors has checked it
        spans = []
        for name, dtype in ((name, self.dtype(name)) for name, place in self._file_of.items() if place == file):
            if dtype is not None and not LEFTOVERS.search(name):
                start, end = header[name]["data_offsets"]
                place = 8 + length + start, end - start
                spans.append(Span(name, self.shape(name), *place, dtype.itemsize, plain(dtype)))
        return spans
