"""A device that isn't there is refused before any work."""

import pytest
import torch

from eigenslice.device import resolve_device
from eigenslice.errors import OptionsError


def test_cpu_is_taken_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


def test_default_is_a_gpu_if_there_is_one() -> None:
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(OptionsError, match=f"--device {name} can't be used"):
        resolve_device(name)
