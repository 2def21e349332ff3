"""What is done with a result: finetune, bench and report on the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eigenslice.report.manifest import read_manifest
from tests import tiny
from tests.cli.conftest import Command, Failure
from tests.results import stored_tensors


@pytest.fixture
def sliced(command: Command, model: Path, calibration: Path, tmp_path: Path) -> Path:
    """A sliced model."""
    output = tmp_path / "sliced"
    assert command("slice", model, "-o", output, "--width", 24, "--calibration", calibration, "-q").code == 0
    return output


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Token ids to train on."""
    path = tmp_path / "train.safetensors"
    save_file({"calibration": tiny.structured_ids(24, 16, seed=5)}, path)
    return path


def test_finetune_bench_and_report(command: Command, model: Path, sliced: Path, train: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    options = ["--teacher", model, "--calibration", train, "--held-out", 4, "--device", "cpu"]
    outcome = command("finetune", sliced, "-o", tuned, *options)
    assert outcome.code == 0, outcome
    manifest = read_manifest(tuned)
    assert manifest is not None
    section = manifest["finetune"]
    assert f"perplexity {section['perplexity']['before']:.4f} -> {section['perplexity']['after']:.4f}" in outcome.out
    assert section["objective"] == {"distillation": 0.8, "next_token": pytest.approx(0.2)}
    assert section["options"]["teacher"] == str(model)
    assert stored_tensors(tuned) == stored_tensors(sliced)

    arguments = ["--prompt", 8, "--new", 3, "--runs", 1, "--no-memory", "--device", "cpu"]
    timed = command("bench", model, tuned, *arguments, "--json", "-q")
    assert [row["model"] for row in timed.json["models"]] == [str(model), str(tuned)]
    table = command("bench", model, tuned, *arguments, "-q").out
    assert "prefill, tokens/s" in table
    assert f"{timed.json['models'][1]['parameters']:,}" in table

    (tmp_path / "bench.json").write_text(timed.out)
    measured = command("eval", model, tuned, "--data", train, "--device", "cpu", "--json", "-q")
    (tmp_path / "perplexity.json").write_text(measured.out)
    written = command("eval", model, tuned, "--generate", "builtin", "--prompts", 2, "--new", 3, "--json", "-q")
    (tmp_path / "writing.json").write_text(written.out)
    page = tmp_path / "page.html"
    files = ["--bench", tmp_path / "bench.json", "--perplexity", tmp_path / "perplexity.json"]
    files += ["--writing", tmp_path / "writing.json"]
    outcome = command("report", tuned, "-o", page, *files, "--generate", model, "--prompt", "w5 w6", "--new", 2)
    assert (outcome.code, outcome.out) == (0, f"{page}\n")
    text = page.read_text(encoding="utf-8")
    assert all(f'id="plot-{name}"' in text for name in ("roles", "spectrum", "perplexity", "prefill", "training"))
    assert f"{written.json['models'][1]['sampled']['dense_perplexity']:.2f} (x" in text


def test_what_is_printed_as_json_is_the_manifest(command: Command, sliced: Path, train: Path, tmp_path: Path) -> None:
    options = ["--full", "--calibration", train, "--held-out", 4, "--device", "cpu", "--json", "-q"]
    outcome = command("finetune", sliced, "-o", tmp_path / "tuned", *options)
    assert outcome.json == read_manifest(tmp_path / "tuned")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--recipe", "none"], "--recipe none"),
        (["--distill", 0.5], "--distill 0.5 without --teacher"),
        (["--full", "--keep-adapter"], "--full with --keep-adapter"),
        (["--rank", 0], "--rank 0"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--batch", 4, "--micro-batch", 3], "--batch 4 --micro-batch 3"),
        (["--held-out", 99], "windows of text, of which 99 are to be held out"),
        (["--log-to", "paper"], "--log-to paper"),
        (["--samples", 0], "--samples 0"),
    ],
    ids=str,
)
def test_training_that_can_not_be_done(
    arguments: list[object], found: str, fails: Failure, sliced: Path, train: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ["--calibration", train, "--device", "cpu"]
    assert found in fails("finetune", sliced, "-o", tmp_path / "tuned", *options, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_teacher_of_another_vocabulary(fails: Failure, sliced: Path, train: Path, tmp_path: Path) -> None:
    other = tiny.tiny_model("llama", tiny.LLAMA | {"vocab_size": tiny.VOCABULARY + 8}, torch.float32)
    tiny.save(other, tmp_path / "other")
    options = ["--calibration", train, "--device", "cpu", "--teacher", tmp_path / "other"]
    message = fails("finetune", sliced, "-o", tmp_path / "tuned", *options)
    assert f"has a vocabulary of {tiny.VOCABULARY + 8} tokens" in message


def test_reports_and_benchmarks_that_can_not_be_made(fails: Failure, model: Path, sliced: Path, tmp_path: Path) -> None:
    assert "is no sliced model" in fails("report", model)
    (tmp_path / "x.json").write_text(json.dumps({"models": 3}))
    assert "x.json: this JSON is not what it should be" in fails("report", sliced, "--bench", tmp_path / "x.json")
    assert "--runs 0" in fails("bench", model, "--runs", 0)
    assert "takes 64 tokens" in fails("bench", model, "--prompt", 100, "--device", "cpu", "-q")
    assert "--tasks with --data" in fails("eval", model, "--tasks", "piqa", "--data", "builtin")
