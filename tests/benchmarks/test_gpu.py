"""The script for users with a GPU, on an emulated one."""

import json
from pathlib import Path

import pytest
import torch

import gpu
from tests.fake_device import fake_device


def test_without_a_gpu_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.main(["-o", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()


def test_it_compares_gpu_and_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "KINDS", ("llama",))
    with fake_device():
        result = gpu.report(tmp_path, None, is_large=False)
    row = json.loads(json.dumps(result))["tiny"]["llama"]
    assert row["agrees"]
    assert row["cuda"]["precision"]["solve"] == "float32"
    assert row["cpu"]["precision"]["solve"] == "float64"
    assert row["cuda"]["peak_device_bytes"] > 0
    assert {"measuring", "slicing", "head"} <= row["cuda"]["seconds"].keys()
