"""Two machines without a common file system: each rank has an output folder of its own, and the first one writes."""

import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenslice.runtime import run_state
from tests import processes, tiny
from tests.checkpoint.files import copy_of
from tests.conftest import Folders
from tests.results import load, relative

KINDS: dict[str, tuple[str, list[str]]] = {
    "planned": ("llama-tied", ["--keep", "0.6"]),
    "per-block": ("opt", ["--width", "24", "--basis", "per-block"]),
    "files as memory": ("llama", ["--width", "24", "--neurons", "40", "--offload", "disk"]),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Token ids of which each rank runs a part for a while."""
    file = tmp_path / "ids.safetensors"
    save_file({"calibration": tiny.structured_ids(40, 32, seed=1)}, file)
    return file


def saving_always(*arguments: str) -> None:
    """Run the command line; states are saved after each block, however long that takes."""
    run_state.SHARE = 1.0
    processes.run_command(*arguments)


def nodes(folder: Path, arguments: list[Any], models: tuple[Any, Any]) -> list[ForkServerProcess]:
    """Start a rank on each of two machines, as torchrun does; outputs are NODE/out."""
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = processes.free_port()
    started = []
    for rank, model in enumerate(models):
        (folder / str(rank)).mkdir(exist_ok=True)
        command = ["slice", model, *arguments, "-o", folder / str(rank) / "out"]
        log = folder / f"{rank}.log"
        started.append(processes.call(saving_always, *map(str, command), log=log, environment=common | {"RANK": rank}))
    return started


def finished(folder: Path, ranks: list[ForkServerProcess]) -> list[int | None]:
    """The exit codes of ranks."""
    for rank in ranks:
        rank.join(300)
    return [rank.exitcode for rank in ranks]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load(folder)(tiny.random_ids(3, 20)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_machine_has_the_result(kind: str, dense_folder: Folders, text: Path, tmp_path: Path) -> None:
    case, size = KINDS[kind]
    model, arguments = dense_folder(case), ["--calibration", text, *size]
    alone = processes.command("slice", model, *arguments, "-o", tmp_path / "alone", log=tmp_path / "alone.log")
    assert finished(tmp_path, [*nodes(tmp_path, arguments, (model, model)), alone]) == [0, 0, 0], logs(tmp_path)
    assert relative(logits(tmp_path / "0" / "out"), logits(tmp_path / "alone")) < 1e-5
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["out"]
    assert not list((tmp_path / "1").iterdir())


@pytest.mark.parametrize("lost", [None, 0, 1], ids=["nothing", "the first one's state", "the second one's state"])
def test_an_interrupted_run_goes_on(lost: int | None, dense_folder: Folders, text: Path, tmp_path: Path) -> None:
    """With all states, or anew where a machine has lost its own; the result is the same in any case."""
    model, arguments = dense_folder("llama"), ["--calibration", text, "--width", "24", "--neurons", "40"]
    partial = [tmp_path / str(rank) / "out.partial" for rank in range(2)]
    ranks = nodes(tmp_path, arguments, (model, model))
    deadline = time.monotonic() + 120
    while not all(list(folder.glob("state/at-*")) for folder in partial) and time.monotonic() < deadline:
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
    finished(tmp_path, ranks)
    assert all(list(folder.glob("state/*")) for folder in partial), logs(tmp_path)
    if lost is not None:
        shutil.rmtree(partial[lost])
    resumed = nodes(tmp_path, [*arguments, "--resume"], (model, model))
    alone = processes.command("slice", model, *arguments, "-o", tmp_path / "alone", log=tmp_path / "alone.log")
    assert finished(tmp_path, [*resumed, alone]) == [0, 0, 0], logs(tmp_path)
    assert relative(logits(tmp_path / "0" / "out"), logits(tmp_path / "alone")) < 1e-5
    assert not list((tmp_path / "1").iterdir())
    assert finished(tmp_path, nodes(tmp_path, [*arguments, "--resume"], (model, model))) == [0, 0]  # it is complete


def test_machines_with_different_models_are_refused(dense_folder: Folders, text: Path, tmp_path: Path) -> None:
    model = dense_folder("llama")
    other = tiny.save(tiny.tiny_model("llama", tiny.LLAMA | {"rms_norm_eps": 1e-5}), tmp_path / "other")
    assert copy_of(model, tmp_path / "same")
    arguments = ["--calibration", text, "--width", "24"]
    assert finished(tmp_path, nodes(tmp_path, arguments, (model, other))) == [2, 2]
    assert "a rank reads something else than the first one: input config.json" in logs(tmp_path)
    assert not list((tmp_path / "0").iterdir())
    assert not list((tmp_path / "1").iterdir())
    assert finished(tmp_path, nodes(tmp_path, arguments, (model, tmp_path / "same"))) == [0, 0], logs(tmp_path)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
