"""Recovery fine-tuning of tiny models, from folder to folder."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.data.batches import Batch
from eigenslice.errors import CheckpointError, MemoryRanOutError, OptionsError, OutputError
from eigenslice.evaluation.perplexity import perplexity
from eigenslice.finetune import FinetuneOptions, finetune, with_recipe
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.runtime.output import partial_path
from tests import processes, tiny
from tests.checkpoint.files import copy_of
from tests.conftest import Slicer
from tests.finetune.conftest import Training, Tuner
from tests.messages import check_message
from tests.results import load, stored_tensors


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama", {}),
        ("llama-tied", {"full": True}),
        ("qwen2", {"dtype": "bfloat16"}),
        ("llama", {"basis": "per-block"}),
        ("opt", {}),
        ("opt", {"full": True, "checkpoint_activations": True}),
        ("phi", {}),
        ("gpt_neox", {"basis": "per-block", "full": True}),
    ],
    ids=str,
)
def test_training_helps_and_the_result_is_stored_as_before(
    case: str, options: dict[str, Any], run_slice: Slicer, tune: Tuner
) -> None:
    sliced = run_slice(case, width=24, basis=options.pop("basis", "global")).output
    before = {file.name: file.read_bytes() for file in sliced.iterdir()}
    result = tune(sliced, **options)
    assert {file.name: file.read_bytes() for file in sliced.iterdir()} == before, "the input was written to"
    assert result.after.loss < result.before.loss - 0.05
    assert stored_tensors(result.output) == stored_tensors(sliced)
    assert (result.output / "config.json").read_bytes() == before["config.json"]
    assert {f.name for f in result.output.iterdir()} - {"README.md"} == before.keys() - {"README.md"}
    manifest = json.loads((result.output / "eigenslice.json").read_text())
    assert manifest == result.manifest
    section = manifest.pop("finetune")
    expected = json.loads(before["eigenslice.json"])
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in result.output.glob("*.safetensors")}
    assert manifest.pop("sha256") == hashes != expected.pop("sha256")
    assert manifest.pop("run") != expected.pop("run")
    assert manifest == expected
    assert section["steps"] == 10
    assert not partial_path(result.output).exists()
    # what is stored is what was measured
    ids = tiny.structured_ids(44, 16, seed=5)[-4:]
    measured = perplexity(load(result.output, dtype=torch.float32), [Batch(ids)])
    assert abs(measured.loss - result.after.loss) < 1e-4
    assert measured.perplexity == pytest.approx(section["perplexity"]["after"], rel=1e-4)


def test_distillation_comes_closer_to_the_dense_model(
    dense_folder: Callable[[str], Path], run_slice: Slicer, tune: Tuner
) -> None:
    """The KL divergence, computed here in float64, falls on tokens of the same kind that weren't trained on."""
    dense, sliced = dense_folder("llama"), run_slice("llama", width=16, refit=False).output
    tuned = tune(sliced, teacher=str(dense), distill=1.0, full=True, epochs=4).output
    ids = tiny.structured_ids(16, 16, seed=77)

    def log_p(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return load(folder, dtype=torch.float64)(ids).logits.log_softmax(-1)

    expected = log_p(dense)
    kl = [float((expected.exp() * (expected - log_p(f))).sum(-1).mean()) for f in (sliced, tuned)]
    assert kl[1] < 0.9 * kl[0], kl


def test_a_kept_adapter_computes_what_the_merged_one_does(run_slice: Slicer, tune: Tuner) -> None:
    sliced = run_slice("opt", width=24).output
    merged, kept = (tune(sliced, keep_adapter=keep).output for keep in (False, True))
    weights = "model.safetensors"
    assert (kept / weights).read_bytes() == (sliced / weights).read_bytes()
    ids = tiny.random_ids(2, 12)
    with torch.no_grad():
        logits = [load(folder, dtype=torch.float32)(ids).logits for folder in (merged, kept, sliced)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[2], logits[0], atol=1e-2)
    with pytest.raises(CheckpointError, match="holds an adapter"):
        tune(kept)


def test_early_stopping(run_slice: Slicer, tune: Tuner) -> None:
    sliced = run_slice("llama", width=24).output
    with pytest.warns(match="Training didn't help"):
        section = tune(sliced, learning_rate=1.0, patience=1, evaluate_every=1).manifest["finetune"]
    assert section["steps"] < 10
    losses = [loss for _, loss in section["held_out_loss"]]
    assert losses[-1] >= losses[-2]


def train_and_die(options: str, step: int) -> None:
    """Runs in a process of its own."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    finetune(FinetuneOptions.model_validate_json(options), progress)


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_a_killed_run_goes_on_to_the_same_weights(
    full: bool, run_slice: Slicer, tune: Tuner, data: CalibrationOptions, tmp_path: Path
) -> None:
    sliced = run_slice("llama", width=24).output
    kwargs: dict[str, Any] = {"full": full, "evaluate_every": 3, "epochs": 2, "patience": 9}
    kwargs |= {} if full else {"dropout": 0.3}  # random numbers that have to go on, too
    expected = load_file(tune(sliced, **kwargs).output / "model.safetensors")
    output = tmp_path / "killed"
    options = FinetuneOptions(
        model=str(sliced), output=output, data=data, held_out=4, batch=4, device="cpu", learning_rate=1e-2, **kwargs
    )
    process = processes.call(train_and_die, options.model_dump_json(), 8, log=tmp_path / "log")
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    checkpoints = partial_path(output) / "state"
    assert not output.exists()
    assert {path.name for path in checkpoints.glob("checkpoint-*")} >= {"checkpoint-6"}
    (checkpoints / "checkpoint-7").mkdir()  # what a kill while writing would leave
    with pytest.raises(OutputError, match="interrupted run"):
        finetune(options)
    with pytest.raises(OptionsError, match=r"finetune learning_rate was 0\.01, is 0\.02"):
        finetune(options.model_copy(update={"resume": True, "learning_rate": 2e-2}))
    steps = []
    result = finetune(options.model_copy(update={"resume": True}), lambda *step: steps.append(step))
    assert next(done for stage, done, _ in steps if stage == "training") == 6
    actual = load_file(result.output / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert result.manifest["finetune"]["loss"][-1][0] == 20
    assert not partial_path(output).exists()


def test_two_processes_train_the_same_weights(
    run_slice: Slicer, tune: Tuner, data: CalibrationOptions, tmp_path: Path
) -> None:
    """Gradients are averaged over processes as over the windows of one."""
    sliced = run_slice("llama", width=24).output
    expected = load_file(tune(sliced, full=True).output / "model.safetensors")
    arguments = ["finetune", sliced, "-o", tmp_path / "two", "--full", "--held-out", 4, "--batch", 4]
    arguments += ["--learning-rate", 1e-2, "--calibration", data.data[0], "--device", "cpu"]
    log = tmp_path / "log"
    for rank in processes.ranks(2, *arguments, log=log):
        rank.join(300)
        assert rank.exitcode == 0, log.read_text()
    assert log.read_text().count("perplexity") == 1, "both processes speak"
    actual = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.allclose(actual[name], expected[name], atol=1e-4) for name in expected)


def test_chat_records_are_written_in_the_template(run_slice: Slicer, tune: Tuner, tmp_path: Path) -> None:
    sliced = copy_of(run_slice("llama", width=24).output, tmp_path / "chat")
    tiny.save_tokenizer(sliced)
    records = [{"instruction": "abc" * 9, "output": "xyz" * 9} for _ in range(40)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    options = CalibrationOptions(data=str(tmp_path / "records.json"), samples=40, seqlen=16)
    section = tune(sliced, data=options).manifest["finetune"]
    assert section["data"]["data"] == "records.json, chat template"
    plain = options.model_copy(update={"field": ("instruction,output",)})
    assert tune(sliced, data=plain).manifest["finetune"]["data"]["data"] == "records.json"


def test_what_can_not_be_trained(dense_folder: Callable[[str], Path], run_slice: Slicer, tune: Tuner) -> None:
    with pytest.raises(CheckpointError, match="is no sliced model"):
        tune(dense_folder("llama"))
    sliced = run_slice("llama", width=24).output
    with pytest.raises(OptionsError, match=r"--distill 0\.5 without --teacher"):
        tune(sliced, distill=0.5)
    with pytest.raises(OptionsError, match="--batch 4 --micro-batch 3"):
        tune(sliced, micro_batch=3)
    with pytest.raises(OutputError, match="exists already"):
        tune(sliced, output=sliced)


def test_the_papers_recipe() -> None:
    options = with_recipe("paper", {"model": "m", "output": Path("o"), "alpha": 12.0}, {"samples": 10})
    assert (options.rank, options.alpha, options.dropout) == (32, 12.0, 0.05)
    assert options.data == CalibrationOptions(data="alpaca", samples=10, seqlen=1024)
    with pytest.raises(OptionsError, match="--recipe none"):
        with_recipe("none", {}, {})


def test_training_says_where_and_goes_on(training: Training, tmp_path: Path) -> None:
    options = training.at(tmp_path / "out", resume=False)

    def memory_runs_out(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("training", 7):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(MemoryRanOutError) as caught:
        finetune(options, memory_runs_out)
    check_message(caught.value, "in stage training, 7 of 8")
    assert all(words in caught.value.next_step for words in ("--checkpoint-activations", "--resume goes on"))
    finetune(training.at(tmp_path / "out"))
    training.check(tmp_path / "out")
