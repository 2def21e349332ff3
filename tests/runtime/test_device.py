"""A device that isn't there is refused before any work; memory is given back."""

import platform
from pathlib import Path

import psutil
import pytest
import torch

from eigenslice.errors import OptionsError
from eigenslice.runtime.device import resolve_device, unmap_freed_tensors
from tests import processes


def test_cpu_is_taken_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


def test_default_is_a_gpu_if_there_is_one() -> None:
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x", "meta", "meta:0", "", "CPU", "lazy"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(OptionsError, match=f"--device {name} can't be used"):
        resolve_device(name)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch says and is told on a machine with four GPUs; the ones that were made current."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)
    return chosen


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_of_torchrun_has_a_gpu_of_its_own(
    name: str | None, four_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert resolve_device(name) == torch.device("cuda:2")
    assert four_gpus == [2]


@pytest.mark.parametrize(("name", "rank"), [("cuda:0", 1), (None, 4)])
def test_processes_do_not_share_a_gpu(
    name: str | None, rank: int, four_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(OptionsError, match=f"process {rank} of this machine, which has 4 GPUs"):
        resolve_device(name)
    assert not four_gpus


def test_one_process_takes_the_current_gpu_or_the_one_named(four_gpus: list[int]) -> None:
    assert resolve_device(None) == torch.device("cuda")
    assert resolve_device("cuda:3") == torch.device("cuda:3")
    assert not four_gpus


def free_large_tensors(unmaps: str, result: str) -> None:
    """Free 128 MiB, with small tensors between them that stay; write by how much the process has grown."""
    if unmaps:
        unmap_freed_tensors()
    pins, before = [], psutil.Process().memory_info().rss
    for _ in range(2):  # from the second time on, glibc takes 8 MiB from its heap
        large = []
        for _ in range(16):
            large.append(torch.ones(2**21))
            pins.append(torch.ones(2**14))
        del large
    Path(result).write_text(str(psutil.Process().memory_info().rss - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_freed_tensors_go_back_to_the_system(tmp_path: Path) -> None:
    def left(unmaps: str) -> int:
        result, log = tmp_path / f"left{unmaps}", tmp_path / "log"
        process = processes.call(free_large_tensors, unmaps, str(result), log=log)
        process.join(120)
        assert process.exitcode == 0, log.read_text()
        return int(result.read_text())

    assert left("unmaps") < 2**24
    assert left("") > 2**26  # else there is nothing to show
