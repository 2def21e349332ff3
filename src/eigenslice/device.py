"""Choosing the torch device."""

import ctypes
import sys
from contextlib import suppress

import torch

from eigenslice.errors import OptionsError


def resolve_device(name: str | None) -> torch.device:
    """The device of a name; without one, a GPU if there is one.

    Raises:
        OptionsError: there is no such device here, or it can't compute in float64.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError, TypeError and its own
        first = (str(error).strip().splitlines() or [""])[0]
        raise OptionsError(
            f"--device {name} can't be used ({first})",
            allowed="cpu" + (", cuda, cuda:0, ..." if torch.cuda.is_available() else "; torch sees no GPU here"),
            next_step="choose one of these, or leave --device out",
        ) from error
    return device


def trim_memory() -> None:
    """Give the system back what was freed: glibc keeps holes between blocks' tensors, hundreds of megabytes in all."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
