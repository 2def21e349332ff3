"""The place of a whole model: one device; or, where it doesn't fit, several GPUs, the host's memory and files."""

import shutil
import tempfile
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from eigenslice.errors import CheckpointError, EigensliceWarning
from eigenslice.runtime.offload import free_bytes

SHARE = 0.9
"""Share of the free memory that weights may take; the rest is for what the model computes."""
GB = 10**9


@dataclass(frozen=True, eq=False)
class Place:
    """The place of a model. Files of the model's parts are removed with it.

    Attributes:
        device: The device of the model's input and output.
        keywords: Arguments of transformers' `from_pretrained`. Without any, the model is on the CPU afterwards.
        folder: The folder of the parts that lie in files, if there may be some.
    """

    device: torch.device
    keywords: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.folder is not None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def settle(self, model: Any) -> Any:
        """Return a loaded model in its place, which lasts as long as the model."""
        model.eigenslice_place = self
        return model if self.keywords else model.to(self.device)


def place_model(name: str, needed: int, device: torch.device, *, spread: bool = True) -> Place:
    """Choose the place of a model. A GPU gets its weights one by one, so that host memory never holds all of them.

    Args:
        name: Name of the model, for the message.
        needed: Bytes of the model's weights.
        device: The device of the model's input. One without a number stands for all GPUs, one after the other.
        spread: False if the model has an adapter, which is applied to weights in one place.

    Raises:
        CheckpointError: the model doesn't fit on the device, and can't be spread.
    """
    fits = needed <= SHARE * free_bytes(device)
    if device.type not in ("cuda", "cpu") or (fits and device.type == "cpu"):
        return Place(device)
    if fits:
        index = torch.cuda.current_device() if device.index is None else device.index
        return Place(device, {"device_map": {"": torch.device("cuda", index)}})
    if not spread:
        raise CheckpointError(
            f"{name} has an adapter beside {needed / GB:.1f} GB of weights, and {device} has "
            f"{free_bytes(device) / GB:.1f} GB free",
            allowed="an adapter where the whole model fits on one device",
            next_step="merge the adapter into the weights first",
        )
    gpus: list[int] = []
    if device.type == "cuda":
        gpus = list(range(torch.cuda.device_count())) if device.index is None else [device.index]
    room: dict[int | str, int] = {gpu: int(SHARE * free_bytes(torch.device("cuda", gpu))) for gpu in gpus}
    on_gpus = sum(room.values())
    room["cpu"] = int(SHARE * free_bytes(torch.device("cpu")))
    folder = tempfile.mkdtemp(prefix="eigenslice-")
    if needed > on_gpus:
        where = f"{on_gpus / GB:.1f} GB of that fit on the GPU, " if gpus else ""
        where += f"{room['cpu'] / GB:.1f} GB into the host's memory"
        where += ", the rest is read from the disk each time" * (needed > on_gpus + room["cpu"])
        warnings.warn(f"{name} takes {needed / GB:.1f} GB: {where}. That is slow.", EigensliceWarning, stacklevel=3)
    return Place(device, {"device_map": "auto", "max_memory": room, "offload_folder": folder}, folder)
