"""The weight files of a result, and their part of the saved state."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eigenslice.arch import lookup
from eigenslice.checkpoint.source import open_source
from eigenslice.errors import EigensliceWarning
from eigenslice.model.dense import DenseModel
from eigenslice.plan.plan import Plan, widths
from eigenslice.runtime import run_state
from eigenslice.runtime.ranks import Ranks
from eigenslice.slicing.result_files import SLICING_STAGE, ResultFiles
from eigenslice.stream.run import Run
from tests import tiny
from tests.conftest import Folders
from tests.results import load, stored_tensors
from tests.runs import run_of

SHARD_GIB = 2e-5
"""About 20 KB: the tiny model takes several files."""


class SecondRank(Ranks):
    """A rank that isn't the first, and that gets the answers which the first rank would give."""

    def on_first(self, do: Any) -> Any:
        return do()


def opened(folder: Path, tmp_path: Path) -> Run:
    return run_of(DenseModel(open_source(str(folder))), [], tmp_path)


def whole_plan(run: Run, *, stock: bool) -> Plan:
    """Return the plan that cuts nothing."""
    dense = run.dense
    form = lookup(dense.config).stock[0] if stock else None
    neurons = (dense.anatomy.neuron_count,) * dense.anatomy.block_count
    return Plan("global", widths(dense.anatomy, "global", dense.anatomy.width), False, form, neurons)


def written(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def parameters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of transformers' model, under its names."""
    yield from load(folder).state_dict().items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_a_stock_result_holds_the_checkpoints_tensors(
    case: str, dtype: torch.dtype, dense_folder: Folders, tmp_path: Path
) -> None:
    """Given transformers' parameters, the files hold the checkpoint: its names, its experts one by one."""
    folder = dense_folder(case)
    run = opened(folder, tmp_path)
    files = ResultFiles.begin(run, whole_plan(run, stock=True), tmp_path / "result", dtype, SHARD_GIB)
    files.write(parameters(folder))
    files.writer.finish()
    checkpoint, result = written(folder), written(tmp_path / "result")
    assert len(list((tmp_path / "result").glob("*.safetensors"))) > 1
    assert result.keys() == checkpoint.keys()
    for name, tensor in checkpoint.items():
        assert torch.equal(result[name], tensor.to(dtype))
    assert files.dtype == dtype


def test_a_custom_result_has_its_names_below_the_dense_model(dense_folder: Folders, tmp_path: Path) -> None:
    run = opened(dense_folder("llama"), tmp_path)
    files = ResultFiles.begin(run, whole_plan(run, stock=False), tmp_path / "result", torch.float32, 1.0)
    tensor = torch.randn(tiny.VOCABULARY, tiny.WIDTH)
    files.write([("model.embed_tokens.weight", tensor)])
    assert torch.equal(written(tmp_path / "result")["model.model.embed_tokens.weight"], tensor)
    assert not any("norm" in name for name in stored_tensors(tmp_path / "result")), "norms of the class have no gain"


def test_only_the_first_rank_writes(dense_folder: Folders, tmp_path: Path) -> None:
    folder = dense_folder("llama")
    run = dataclasses.replace(opened(folder, tmp_path), ranks=SecondRank(1, 2))
    files = ResultFiles.begin(run, whole_plan(run, stock=True), tmp_path / "result", torch.float32, 1.0)
    files.write(parameters(folder))
    assert files.content() == {"dtype": "torch.float32", "written": {}}
    assert not any(tensor.any() for tensor in written(tmp_path / "result").values())


@pytest.fixture
def always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save however long that takes."""
    monkeypatch.setattr(run_state, "SHARE", 1.0)


def interrupted(folder: Path, tmp_path: Path) -> tuple[Run, Path, list[str]]:
    """Save a position behind half of the tensors, and write one more tensor; return their names in order."""
    run, result = opened(folder, tmp_path), tmp_path / "result"
    files = ResultFiles.begin(run, whole_plan(run, stock=True), result, torch.float32, SHARD_GIB)
    tensors = list(parameters(folder))
    half = len(tensors) // 2
    files.write(tensors[:half])
    run.state.save(SLICING_STAGE, 1, {}, {}, files.content)
    files.write(tensors[half : half + 1])
    return run, result, [name for name, _ in tensors[:half]]


@pytest.mark.usefixtures("always_saved")
def test_an_interrupted_pass_goes_on_behind_the_saved_tensors(dense_folder: Folders, tmp_path: Path) -> None:
    folder = dense_folder("llama")
    run, result, names = interrupted(folder, tmp_path)
    before = written(result)
    files = ResultFiles.begin(run, whole_plan(run, stock=True), result, torch.float32, SHARD_GIB)
    position = files.position()
    assert position is not None
    assert position.block == 1
    assert set(files.writer.checksums) == set(names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in written(result).items())
    with pytest.raises(ValueError, match="never written"):
        files.writer.finish()
    files.write((name, tensor) for name, tensor in parameters(folder) if name not in names)
    files.writer.finish()
    assert all(torch.equal(tensor, written(folder)[name]) for name, tensor in written(result).items())


@pytest.mark.usefixtures("always_saved")
def test_in_another_dtype_the_pass_begins_anew(dense_folder: Folders, tmp_path: Path) -> None:
    run, result, _ = interrupted(dense_folder("llama"), tmp_path)
    files = ResultFiles.begin(run, whole_plan(run, stock=True), result, torch.bfloat16, SHARD_GIB)
    assert files.position() is None
    assert files.writer.checksums == {}


@pytest.mark.usefixtures("always_saved")
def test_a_changed_file_is_noticed_and_the_pass_begins_anew(dense_folder: Folders, tmp_path: Path) -> None:
    run, result, names = interrupted(dense_folder("llama"), tmp_path)
    changed = next(file for file in sorted(result.iterdir()) if set(load_file(file)) & set(names))
    data = bytearray(changed.read_bytes())
    data[-3] ^= 1
    changed.write_bytes(data)
    files = ResultFiles.begin(run, whole_plan(run, stock=True), result, torch.float32, SHARD_GIB)
    with pytest.warns(EigensliceWarning, match="slicing begins anew"):
        assert files.position() is None
    assert run.state.position(SLICING_STAGE) is None
    assert files.writer.checksums == {}


def test_without_a_saved_position_the_pass_begins_anew(dense_folder: Folders, tmp_path: Path) -> None:
    run = opened(dense_folder("llama"), tmp_path)
    files = ResultFiles.begin(run, whole_plan(run, stock=True), tmp_path / "result", torch.float32, 1.0)
    assert files.position() is None
