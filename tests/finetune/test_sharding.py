"""Weights that processes share, or that lie on the host: trained to the weights of one process that has them whole."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from eigenslice.finetune import FinetuneOptions, finetune, recovery, sharding
from eigenslice.finetune.models import Models
from eigenslice.finetune.sharding import local
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.runtime.output import partial_path
from tests import processes
from tests.conftest import Folders, Slicer
from tests.finetune.conftest import Tuner, contents
from tests.results import stored_tensors

HALF = 0.55
"""Largest share of a model that one of two processes may hold: where there is an odd number of rows, one has more."""

PARTS = {"weights": "safetensors", "optimizer": "pt"}
"""Files of a process's part of a checkpoint."""


def train(options: str, die_at: str = "-1") -> None:
    """Train, and print which share of each model this process holds; runs in a process of its own."""
    load = recovery.load_models

    def spied(*arguments: Any) -> Models:
        models = load(*arguments)
        for name, loaded in (("trained", models.trained), ("teacher", models.teacher)):
            if loaded is not None:
                parameters = list(loaded.model.parameters())
                assert all(isinstance(p, DTensor) for p in parameters)
                held = sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
                sys.stderr.write(f"{name} {held:.3f}\n")  # at once: two processes write into one log
        return models

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", int(die_at)):
            os.kill(os.getpid(), signal.SIGKILL)

    recovery.load_models = spied
    result = finetune(FinetuneOptions.model_validate_json(options), progress)
    sys.stderr.write(f"losses {result.before.loss:.6f} {result.after.loss:.6f}\n")


def train_together(options: FinetuneOptions, folder: Path, die_at: int = -1) -> str:
    """Let two processes train; return what they printed."""
    log = folder / "log"
    ranks = processes.ranks(2, options.model_dump_json(), die_at, log=log, run=train)
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL if die_at > 0 else 0] * 2, log.read_text()
    return log.read_text()


@pytest.fixture
def options(data: CalibrationOptions, tmp_path: Path) -> Callable[..., FinetuneOptions]:
    """Options of a short training; keywords are options."""

    def make(model: Path, **more: Any) -> FinetuneOptions:
        values: dict[str, Any] = {
            "model": str(model),
            "output": tmp_path / "two",
            "data": data,
            "held_out": 4,
            "batch": 4,
        }
        values |= {"device": "cpu", "learning_rate": 1e-2, "place": "shared"}
        return FinetuneOptions(**values | more)

    return make


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "stock": ("llama", {}, {"full": True}),
    "custom": ("llama-tied", {"form": "custom"}, {"full": True, "checkpoint_activations": True}),
    "mixture": ("mixtral", {}, {"full": True}),
    "adapters": ("llama", {}, {"full": False, "rank": 3, "learning_rate": 3e-3}),
    "kept adapters": ("opt", {}, {"full": False, "keep_adapter": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_share_the_weights_train_those_of_one(
    name: str,
    dense_folder: Folders,
    run_slice: Slicer,
    tune: Tuner,
    options: Callable[..., FinetuneOptions],
    tmp_path: Path,
) -> None:
    case, form, more = CASES[name]
    sliced = run_slice(case, width=24, **form).output
    more = more | {"teacher": str(dense_folder(case))}
    alone = tune(sliced, **more)
    log = train_together(options(sliced, **more), tmp_path)
    shares = [float(line.split()[1]) for line in log.splitlines() if line.startswith(("trained", "teacher"))]
    assert len(shares) == 4
    assert max(shares) < HALF
    check_same(tmp_path / "two", alone.output, bool(more.get("keep_adapter")))
    assert alone.after.loss < alone.before.loss
    assert contents(tmp_path / "two").keys() == contents(alone.output).keys()
    section = json.loads((tmp_path / "two" / "eigenslice.json").read_text())["finetune"]
    for when in ("before", "after"):
        assert section["perplexity"][when] == pytest.approx(alone.manifest["finetune"]["perplexity"][when], rel=1e-4)
    assert not partial_path(tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["custom", "mixture", "kept adapters"])
def test_weights_on_the_host_are_trained_to_those_on_the_device(
    name: str, dense_folder: Folders, run_slice: Slicer, tune: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, which has a group of its own only while it trains."""
    offloaded = list[bool]()
    fully_shard = sharding.fully_shard

    def watched(module: Any, **ways: Any) -> Any:
        offloaded.append(isinstance(ways["offload_policy"], CPUOffloadPolicy))
        return fully_shard(module, **ways)

    monkeypatch.setattr(sharding, "fully_shard", watched)
    case, form, more = CASES[name]
    sliced = run_slice(case, width=24, **form).output
    more = more | {"teacher": str(dense_folder(case))}
    expected = tune(sliced, **more, place="device")
    assert not offloaded
    found = tune(sliced, **more, place="host")
    assert len(offloaded) > 2
    assert all(offloaded)
    assert not torch.distributed.is_initialized()
    check_same(found.output, expected.output, bool(more.get("keep_adapter")))
    assert (found.before.loss, found.after.loss) == pytest.approx((expected.before.loss, expected.after.loss), rel=1e-5)


def test_a_run_on_the_host_goes_on_to_the_same_bytes(
    dense_folder: Folders, run_slice: Slicer, options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    sliced = run_slice("llama", width=24).output
    values = {"full": True, "teacher": str(dense_folder("llama")), "place": "host", "evaluate_every": 2}
    undisturbed, stopped = (options(sliced, output=tmp_path / name, **values) for name in ("undisturbed", "stopped"))
    finetune(undisturbed)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, stop)
    checkpoint = partial_path(stopped.output) / "state" / "checkpoint-4"
    assert not list(checkpoint.glob("model*"))
    finetune(stopped.model_copy(update={"resume": True}))
    expected, actual = (load_file(one.output / "model.safetensors") for one in (undisturbed, stopped))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def check_same(found: Path, expected: Path, adapter: bool) -> None:
    """Both trainings made the same weights, of the same names and sizes."""
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    tensors, others = (load_file(folder / name) for folder in (found, expected))
    assert tensors.keys() == others.keys()
    for key, tensor in others.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=2e-4)
    assert stored_tensors(found) == stored_tensors(expected)


@pytest.mark.parametrize("full", [True, False], ids=["full", "adapters"])
def test_a_killed_run_goes_on_to_the_same_weights(
    full: bool, dense_folder: Folders, run_slice: Slicer, options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    """Each process writes its part of the weights and of the optimizer, and reads it again."""
    sliced = run_slice("llama", width=24).output
    values = {"full": full, "teacher": str(dense_folder("llama")), "learning_rate": 3e-3, "evaluate_every": 2}
    undisturbed, killed = (options(sliced, output=tmp_path / name, **values) for name in ("undisturbed", "killed"))
    train_together(undisturbed, tmp_path)
    train_together(killed, tmp_path, die_at=5)
    checkpoint = partial_path(killed.output) / "state" / "checkpoint-4"
    files = {path.name for path in checkpoint.iterdir()}
    assert {f"{part}-0000{rank}.{kind}" for part, kind in PARTS.items() for rank in range(2)} < files
    assert not list(checkpoint.glob("model*"))
    train_together(killed.model_copy(update={"resume": True}), tmp_path)
    expected, actual = (load_file(one.output / "model.safetensors") for one in (undisturbed, killed))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not partial_path(killed.output).exists()


def test_bfloat16_is_computed_in_and_float32_is_trained(
    dense_folder: Folders, run_slice: Slicer, tune: Tuner, options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    sliced = run_slice("llama", width=24).output
    more = {"full": True, "dtype": "bfloat16", "teacher": str(dense_folder("llama"))}
    losses = tune(sliced, **more).manifest["finetune"]["perplexity"]
    train_together(options(sliced, **more), tmp_path)
    shared = json.loads((tmp_path / "two" / "eigenslice.json").read_text())["finetune"]["perplexity"]
    assert shared["after"] < 0.95 * shared["before"]
    assert shared == pytest.approx(losses, rel=0.01)
