"""Slicing and healing in one run: nearer to the dense model, whole or not at all, resumed to the same bytes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eigenslice
from eigenslice.errors import OptionsError, OutputError
from eigenslice.finetune import FinetuneResult, finetune
from eigenslice.finetune.held_out import HeldOut, WindowLosses
from eigenslice.healing import slice_model
from eigenslice.healing.heal import training_options
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.report.story import finetune_commands, slice_command
from eigenslice.runtime.output import partial_path, unhealed_path
from tests import processes, tiny, words
from tests.checkpoint.files import copy_of
from tests.conftest import Folders
from tests.finetune.conftest import contents, interrupt_at
from tests.messages import check_message
from tests.results import load

NAMES = ("eigenslice.json", "README.md")
"""Files that name the output."""
SEQLEN, SAMPLES, HEAL = 16, 24, 3000


@pytest.fixture
def healing(dense_folder: Folders, tmp_path: Path) -> Callable[..., SliceOptions]:
    """Options of a run on text; keywords are options."""
    dense = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(dense)
    file = tmp_path / "words.txt"
    file.write_text(words.text(tiny.structured_ids(160, SEQLEN, seed=3).flatten().tolist()))

    def options(name: str, **more: Any) -> SliceOptions:
        text = CalibrationOptions(data=str(file), samples=SAMPLES, seqlen=SEQLEN)
        values: dict[str, Any] = {"model": str(dense), "output": tmp_path / name, "calibration": text, "device": "cpu"}
        values |= {"width": 24, "heal": HEAL} | more
        return SliceOptions(**values)

    return options


def interrupt(stage: str, done: int) -> Callable[..., None]:
    """A progress that raises KeyboardInterrupt."""
    progress = interrupt_at(stage, done)
    return lambda stage, done, total, tokens=0: progress(stage, done, total)


def divergence(dense: Any, other: Any, ids: torch.Tensor) -> float:
    """KL(dense || other) in nats per token, in float64."""
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_healing_comes_nearer_to_the_dense_model(healing: Callable[..., SliceOptions]) -> None:
    options = healing("healed", refit=False)
    plain = slice_model(healing("plain", refit=False, heal=None)).output
    result = slice_model(options)
    assert {file.name for file in result.output.iterdir()} == {file.name for file in plain.iterdir()}
    assert not unhealed_path(options.output).exists()
    assert not partial_path(options.output).exists()
    dense, ids = load(Path(options.model)), tiny.structured_ids(20, SEQLEN, seed=91)
    assert divergence(dense, load(result.output), ids) < 0.8 * divergence(dense, load(plain), ids)
    manifest = json.loads((result.output / "eigenslice.json").read_text())
    assert manifest == result.manifest
    assert manifest["options"] == options.model_dump(mode="json")
    assert f"--heal {HEAL}" in slice_command(manifest)
    assert finetune_commands(manifest) == [], "the command that slices trains, too"
    section = manifest["finetune"]
    assert section["objective"] == {"distillation": 1.0, "next_token": 0.0}
    assert section["steps"] == pytest.approx(HEAL / SEQLEN, abs=1)
    kinds = {text["text"]: text for text in section["texts"]}
    assert list(kinds) == ["words.txt", "text of the model's own"]
    assert all(text["after"] < text["before"] for text in kinds.values())
    assert manifest["loss"]["kl"] == pytest.approx(kinds["words.txt"]["after"], rel=1e-4)


@pytest.mark.parametrize("place", [("slicing", 1), ("before", 0), ("training", 20), ("after", 0)], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bytes(place: tuple[str, int], healing: Callable[..., Any]) -> None:
    expected = contents(slice_model(healing("whole")).output)
    options = healing("again")
    with pytest.raises(KeyboardInterrupt):
        slice_model(options, interrupt(*place))
    assert not options.output.exists()
    with pytest.raises(OutputError):
        slice_model(options)
    again = contents(slice_model(options.model_copy(update={"resume": True})).output)
    assert {n: c for n, c in again.items() if n not in NAMES} == {n: c for n, c in expected.items() if n not in NAMES}
    assert not unhealed_path(options.output).exists()


def test_a_complete_run_is_complete(healing: Callable[..., Any]) -> None:
    options = healing("done", refit=False, heal=1000)
    first = slice_model(options)
    before = contents(first.output)
    again = slice_model(options.model_copy(update={"resume": True}))
    assert (again.manifest, contents(again.output)) == (first.manifest, before)
    with pytest.raises(OptionsError, match="heal was 1000, is 1001") as caught:
        slice_model(options.model_copy(update={"resume": True, "heal": 1001}))
    check_message(caught.value)
    with pytest.raises(OutputError, match="exists already"):
        slice_model(options)


def alone_in_steps_of_two(options: SliceOptions) -> FinetuneResult:
    """What two processes make together, with a window each in a step, made by one process."""
    plain = slice_model(options.model_copy(update={"heal": None, "output": unhealed_path(options.output)}))
    return finetune(training_options(options, plain.output).model_copy(update={"batch": 2}))


def test_two_processes(healing: Callable[..., Any], tmp_path: Path) -> None:
    """The sums of two processes differ by rounding, and training repeats the difference."""
    options = healing("alone")
    alone = alone_in_steps_of_two(options)
    text = options.calibration
    arguments = ["slice", options.model, "-o", tmp_path / "two", "--width", 24, "--heal", HEAL, "--device", "cpu"]
    arguments += ["--calibration", text.data[0], "--samples", SAMPLES, "--seqlen", SEQLEN]
    log = tmp_path / "log"
    for rank in processes.ranks(2, *arguments, log=log):
        rank.join(300)
        assert rank.exitcode == 0, log.read_text()
    assert log.read_text().count("healing: KL") == 1, "both processes speak"
    ids = tiny.structured_ids(4, SEQLEN, seed=91)
    with torch.no_grad():
        logits = [load(folder)(ids).logits for folder in (alone.output, tmp_path / "two")]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05)


def launched_by_accelerate(*arguments: str) -> None:
    """Run the command line with what `accelerate launch --use_fsdp` sets."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    processes.run_command(*arguments)


def test_processes_of_accelerate_share_the_weights(healing: Callable[..., Any], tmp_path: Path) -> None:
    """A shared teacher writes text, too."""
    options = healing("alone", refit=False, heal=1100)
    alone = alone_in_steps_of_two(options)
    text = options.calibration
    arguments = ["slice", options.model, "-o", tmp_path / "two", "--width", 24, "--heal", 1100, "--device", "cpu"]
    arguments += ["--no-refit", "--calibration", text.data[0], "--samples", SAMPLES, "--seqlen", SEQLEN]
    log = tmp_path / "log"
    for rank in processes.ranks(2, *arguments, log=log, run=launched_by_accelerate):
        rank.join(300)
        assert rank.exitcode == 0, log.read_text()
    manifest = json.loads((tmp_path / "two" / "eigenslice.json").read_text())
    assert alone.manifest["finetune"]["options"]["place"] == "device"
    assert manifest["finetune"]["options"]["place"] == "shared"
    losses = [[text["after"] for text in content["finetune"]["texts"]] for content in (alone.manifest, manifest)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    ids = tiny.structured_ids(4, SEQLEN, seed=91)
    with torch.no_grad():
        logits = [load(folder)(ids).logits for folder in (alone.output, tmp_path / "two")]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.01, atol=0.01)


def test_what_can_not_be_healed(healing: Callable[..., Any]) -> None:
    with pytest.raises(OptionsError, match="--device cuda:1 with --heal") as caught:
        slice_model(healing("no", device="cuda:1"))
    check_message(caught.value)
    with pytest.raises(OptionsError, match="--heal 0"):
        healing("no", heal=0)


def test_python_has_the_same_function() -> None:
    assert eigenslice.slice_model is slice_model


def losses(*objectives: tuple[str, float]) -> WindowLosses:
    sums = torch.tensor([[10 * loss, 0.0, 0.0, 10.0] for _, loss in objectives], dtype=torch.float64)
    return WindowLosses([name for name, _ in objectives], sums, 1.0)


def test_a_step_that_is_worse_on_one_text_is_no_gain() -> None:
    before = losses(("a", 1.0), ("a", 1.2), ("b", 0.5), ("b", 0.7))
    better = losses(("a", 0.8), ("a", 0.9), ("b", 0.4), ("b", 0.7))
    worse = losses(("a", 0.1), ("a", 0.1), ("b", 0.6), ("b", 0.81))
    noise = losses(("a", 0.8), ("a", 0.9), ("b", 0.3), ("b", 0.95))
    assert before.by_group() == pytest.approx({"a": 1.1, "b": 0.6})
    assert better.worse_than(before) == {}
    assert better.criterion(before) == pytest.approx(better.mean)
    assert worse.worse_than(before) == pytest.approx({"b": 0.105})
    assert worse.mean < before.mean < worse.criterion(before)
    assert noise.worse_than(before) == {}, "b rises by 0.025, and its windows differ by 0.225"
    nothing = losses(("a", float("nan")), ("a", 0.1), ("b", 0.1), ("b", 0.1))
    assert list(nothing.worse_than(before)) == ["a"]


def test_groups_are_named_once() -> None:
    held_out = HeldOut([torch.arange(3)] * 3, ["b", "a", "b"])
    assert list(WindowLosses(held_out.groups, torch.ones(3, 4), 0.5).by_group()) == ["b", "a"]
