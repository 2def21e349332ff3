"""Perplexity against a formula on the dense model's logits in float64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eigenslice.data.batches import Batch
from eigenslice.errors import CheckpointError
from eigenslice.evaluation.perplexity import evaluate, perplexity
from eigenslice.options.calibration_text import CalibrationOptions
from tests import tiny
from tests.conftest import Slicer
from tests.results import load


def token_losses(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """-log p of tokens 2 to T of one sequence."""
    with torch.no_grad():
        logits = load(folder, dtype=torch.float64)(ids[None]).logits[0]
    return -logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


def test_mean_is_over_all_predicted_tokens(dense_folder: Callable[[str], Path]) -> None:
    folder = dense_folder("llama")
    long, short = tiny.random_ids(2, 20), tiny.random_ids(1, 5, seed=9)
    losses = torch.cat([token_losses(folder, row) for row in (*long, *short)])
    result = perplexity(load(folder), [Batch(long), Batch(short)])
    assert result.tokens == 19 + 19 + 4 == len(losses)
    assert math.isclose(result.loss, float(losses.mean()), rel_tol=1e-5)
    assert math.isclose(result.perplexity, math.exp(losses.mean()), rel_tol=1e-5)


@pytest.mark.parametrize("case", ["llama", "opt"])
def test_padding_doesnt_count(case: str, dense_folder: Callable[[str], Path]) -> None:
    folder = dense_folder(case)
    ids = tiny.random_ids(1, 12)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    result = perplexity(load(folder), [Batch(padded, mask)])
    assert result.tokens == 11
    assert math.isclose(result.loss, float(token_losses(folder, ids[0]).mean()), rel_tol=1e-4)


def test_folders_are_evaluated_by_name(run_slice: Slicer, tmp_path: Path) -> None:
    ids = tiny.random_ids(2, 20)
    save_file({"held_out": ids}, tmp_path / "ids.safetensors")
    output = run_slice("opt", width=24).output
    result = evaluate(str(output), CalibrationOptions(data=str(tmp_path / "ids.safetensors"), field="held_out"))
    losses = torch.cat([token_losses(output, row) for row in ids])
    assert math.isclose(result.loss, float(losses.mean()), rel_tol=1e-5)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        evaluate(str(tmp_path), CalibrationOptions(data="builtin"))
