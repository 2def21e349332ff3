"""A device that isn't there is refused before any work; memory is given back."""

import platform
import subprocess
import sys

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


FREEING = """
import psutil, torch
from eigenslice.device import unmap_freed_tensors
{call}
pins, before = [], psutil.Process().memory_info().rss
for _ in range(2):  # from the second time on, glibc takes 8 MiB from its heap
    large = []
    for _ in range(16):
        large.append(torch.ones(2**21))
        pins.append(torch.ones(2**14))
    del large
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_freed_tensors_go_back_to_the_system() -> None:
    """Of 128 MiB, with small tensors between them that stay."""

    def left(call: str) -> int:
        script = FREEING.format(call=call)
        return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)

    assert left("unmap_freed_tensors()") < 2**24
    assert left("") > 2**26  # else there is nothing to show
