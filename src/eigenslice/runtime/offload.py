"""The place of calibration activations: the device, host memory, or files."""

import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

OffloadChoice = Literal["auto", "none", "disk"]
Place = Literal["device", "host", "disk"]
FREE_SHARE = 0.5
"""Share of the memory that is free now which activations, or a model that writes text, may take."""
MOST = 0.9
"""Share of the memory that is free now which activations may take together with everything else."""
KEY = "x"


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError where it can't be written, such as on a full disk."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or on the host for the CPU; what torch keeps for its next tensors is free."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def fits_beside(needed: float, working: float, free: float) -> bool:
    """Return whether activations fit into memory, beside what a run needs as well; all in bytes."""
    return needed < FREE_SHARE * free and needed + working < MOST * free


def choose_place(choice: OffloadChoice, needed: int, device: torch.device, working: int = 0) -> Place:
    """Choose the place of activations of this size.

    Args:
        choice: The user's choice; auto takes the device if the activations fit, else host memory, else files.
        needed: Size of the activations in bytes.
        device: The model's device.
        working: Memory that the run needs beside the activations on the device, in bytes.
    """
    if choice != "auto":
        return "device" if choice == "none" else "disk"
    if fits_beside(needed, working, free_bytes(device)):
        return "device"
    if device.type == "cuda" and fits_beside(needed, 0, free_bytes(torch.device("cpu"))):
        return "host"
    return "disk"


class OffloadedTensors:
    """Tensors of one kind, one a batch; `x[i]` is on the device, `x[i] = tensor` puts it back to its place.

    Files go with the object: when nobody refers to it any more, its folder is removed.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path | None = None) -> None:
        """folder: where the files are if the place is the disk; it must exist and be empty."""
        self.device = device
        self._place, self._folder = place, folder
        self._tensors: list[Tensor | Path] = []
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True).atexit = False

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        entry = self._tensors[index]
        if isinstance(entry, Tensor):
            return entry.to(self.device)
        with safe_open(entry, framework="pt") as file:
            return file.get_tensor(KEY).to(self.device, copy=True)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._tensors[index] = self._put(index, tensor)

    def append(self, tensor: Tensor) -> None:
        """Add the tensor of one more batch."""
        self._tensors.append(self._put(len(self), tensor))

    def clear(self) -> None:
        """Forget all tensors."""
        for entry in self._tensors:
            if isinstance(entry, Path):
                entry.unlink()
        self._tensors = []

    def _put(self, index: int, tensor: Tensor) -> Tensor | Path:
        if self._place == "device":
            return tensor
        if self._place == "host":
            return tensor.to("cpu")
        assert self._folder is not None
        path = self._folder / f"{index:06d}.safetensors"
        beside = path.with_suffix(".new")
        save_tensors({KEY: tensor}, beside)
        beside.replace(path)  # a new file each time: a saved state may still be linked to the old one
        return path

    def save(self, folder: Path) -> None:
        """Save the current tensors in a new folder; files are linked, not copied."""
        folder.mkdir(parents=True)
        entries = {f"{index:06d}": t for index, t in enumerate(self._tensors)}
        memory = {name: t for name, t in entries.items() if isinstance(t, Tensor)}
        if memory:
            save_tensors(memory, folder / "memory")
        for name, path in entries.items():
            if isinstance(path, Path):
                os.link(path, folder / f"{name}.safetensors")

    def restore(self, folder: Path) -> None:
        """Restore the tensors that `save` wrote, from any place."""
        self.clear()
        kept = load_file(folder / "memory") if (folder / "memory").exists() else {}
        for name in sorted(kept):
            self.append(kept[name])
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.append(file.get_tensor(KEY).clone())


class Offload:
    """Makes `OffloadedTensors` in one place.

    Attributes:
        place: Place of the tensors.
        device: The device that uses the tensors.
        folder: Folder of their files if the place is the disk.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path | None = None) -> None:
        self.place: Place = place
        self.device, self._folder, self._count = device, folder, 0

    def tensors(self) -> OffloadedTensors:
        """Room for tensors of one more kind."""
        folder = None
        if self.place == "disk":
            assert self._folder is not None
            folder = self._folder / f"{self._count:03d}"
            folder.mkdir(parents=True)
            self._count += 1
        return OffloadedTensors(self.place, self.device, folder)

    def reset(self) -> None:
        """Remove the files of all tensors so far."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
