"""Second moments of all sites, on disk: too many to hold for a large model (one is D x D)."""

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class MomentStore:
    """Matrices by the number of their site, in float32, in a folder that goes when the context ends."""

    def __init__(self, parent: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=".moments-", dir=parent))

    def __enter__(self) -> "MomentStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, site: int, moment: Tensor) -> None:
        """Keep a site's matrix."""
        save_file({"moment": moment.float().cpu()}, self._folder / f"{site}.safetensors")

    def get(self, site: int, device: torch.device) -> Tensor:
        """A site's matrix, in float64."""
        return load_file(self._folder / f"{site}.safetensors")["moment"].to(device, torch.float64)
