"""Texts that a model writes: against a loop of forward passes, and against its own probabilities."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.data.own_text import sample_text
from eigenslice.errors import OptionsError, OutputError
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.sampling import SampleOptions
from tests import words
from tests.checkpoint.files import copy_of
from tests.conftest import Folders, Slicer
from tests.messages import check_message
from tests.results import load


@pytest.fixture
def model(dense_folder: Folders, tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(folder)
    return folder


def tokens_of(texts: list[str]) -> list[list[int]]:
    return [words.tokenizer()(text)["input_ids"] for text in texts]


def test_a_cold_model_writes_its_most_likely_tokens(model: Path, tmp_path: Path) -> None:
    options = SampleOptions(model=str(model), output=tmp_path / "t.json", samples=5, seqlen=12, batch=2)
    texts = sample_text(options.model_copy(update={"temperature": 1e-4}))
    assert json.loads((tmp_path / "t.json").read_text()) == texts
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["t.json"]
    dense = load(model)
    beginnings = set()
    for ids in tokens_of(texts):
        beginnings.add(ids[0])
        expected = [ids[0]]
        for _ in range(11):
            with torch.no_grad():
                logits = dense(torch.tensor([expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert ids == [token for token in expected if token > 3]  # special tokens aren't written
    assert len(beginnings) > 2


def test_tokens_are_drawn_as_the_model_predicts_them(model: Path, tmp_path: Path) -> None:
    """All tokens behind one beginning: their frequencies are the model's probabilities, tails included."""
    options = SampleOptions(model=str(model), output=tmp_path / "t.json", samples=4000, seqlen=2, batch=4000)
    pairs = [ids for ids in tokens_of(sample_text(options)) if len(ids) == 2]
    dense, seen, expected = load(model), torch.zeros(words.VOCABULARY), torch.zeros(words.VOCABULARY)
    with torch.no_grad():
        probabilities = dense(torch.tensor([[first] for first, _ in pairs])).logits[:, -1].softmax(-1)
    probabilities[:, :4] = 0
    for (_, second), row in zip(pairs, probabilities / probabilities.sum(-1, keepdim=True), strict=True):
        seen[second] += 1
        expected += row
    assert ((seen - expected).abs() <= 5 * expected.sqrt() + 5).all()
    assert (seen > 0).sum() > 0.8 * (words.VOCABULARY - 4)


def test_the_seed_decides(model: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[str]:
        return sample_text(SampleOptions(model=str(model), output=tmp_path / name, samples=3, seqlen=9, seed=seed))

    first = run("a.json", 0)
    assert run("b.json", 0) == first
    assert run("c.json", 1) != first


def test_the_file_is_calibration_text(model: Path, run_slice: Slicer, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    sample_text(SampleOptions(model=str(model), output=file, samples=30, seqlen=24))
    data = CalibrationOptions(data=str(file), samples=20, seqlen=16)
    result = run_slice("llama", model=str(model), width=24, calibration=data)
    assert result.manifest["calibration"]["sequences"] == 20


def test_output_that_exists_is_kept(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text("mine")
    with pytest.raises(OutputError) as caught:
        sample_text(SampleOptions(model=str(model), output=file, samples=2, seqlen=4))
    check_message(caught.value, "t.json")
    assert file.read_text() == "mine"


def test_longer_than_the_model_takes(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError) as caught:
        sample_text(SampleOptions(model=str(model), output=tmp_path / "t.json", seqlen=100_000))
    check_message(caught.value, "--seqlen 100000")


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"seqlen": 1}, {"batch": 0}, {"temperature": 0.0}, {"output": Path("t.txt")}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    values = {"model": "x", "output": Path("t.json")} | wrong
    with pytest.raises(OptionsError) as caught:
        SampleOptions(**values)
    check_message(caught.value, f"--{next(iter(wrong))}")
