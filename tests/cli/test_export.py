"""`eigenslice export`, and what can go wrong before its runtime is asked."""

import sys
from pathlib import Path

import pytest

from eigenslice.export.gguf import tensors as gguf_tensors
from tests import tiny
from tests.checkpoint.gguf_file import write_gguf
from tests.cli.conftest import Command, Failure
from tests.export import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save(tmp_path / "dense")


def test_what_was_checked_is_printed(command: Command, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.gguf"
    outcome = command("export", folder, "-o", output, "--to", "gguf", "--type", "f16", "-q")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert f"{output}: " in lines[0]
    assert "16 f16" in lines[0]
    assert "gguf against transformers: log-probabilities differ by 0.0" in lines[1]
    assert "at 100 % of 64 positions (allowed: mean 0.03)" in lines[1]
    assert "against the weights before rounding" in lines[2]
    again = command("export", folder, "-o", tmp_path / "again.gguf", "--to", "gguf", "--no-check", "--json")
    assert again.json["agreement"] is None
    assert again.json["bytes"] == output.stat().st_size == (tmp_path / "again.gguf").stat().st_size


def test_a_disagreement_is_exit_code_2(
    fails: Failure, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tensors, "interleave", lambda rows, heads, turned: rows)
    message = fails("export", folder, "-o", tmp_path / "out" / "small.gguf", "--to", "gguf", "-q")
    assert "llama.cpp disagrees with transformers" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "module"), [("gguf", "xllamacpp"), ("openvino", "openvino"), ("onnx", "onnxscript")])
def test_a_runtime_that_is_not_installed(
    to: str, module: str, fails: Failure, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = fails("export", folder, "-o", tmp_path / "out", "--to", to)
    assert f"(import of {module} halted" in message
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_no_folder(fails: Failure, tmp_path: Path) -> None:
    path = write_gguf(tiny.CASES["llama"].build(), tmp_path / "model.gguf")
    assert "is a GGUF file" in fails("export", path, "-o", tmp_path / "out.gguf", "--to", "gguf")
