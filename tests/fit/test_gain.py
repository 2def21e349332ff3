"""The gain before the head: what it says of itself is true of the saved model, and no other gain is better."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.data.holdout import hold_out
from eigenslice.fit import gain as gains
from eigenslice.fit import neuron_readers as neuronfit
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.slicing import SliceResult
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load

SEQUENCES = 17
CUT = {"width": 24, "neurons": 32}


@pytest.fixture
def ids() -> Tensor:
    return tiny.random_ids(SEQUENCES, 24, seed=1)


def sliced(case: str, ids: Tensor, run_slice: Slicer, folder: Path, **options: Any) -> SliceResult:
    file = folder / "sequences.safetensors"
    save_file({"calibration": ids}, file)
    return run_slice(case, calibration=CalibrationOptions(data=str(file)), **CUT | options)


def held_out(ids: Tensor) -> Tensor:
    """Those that a file of token ids in four parts gives."""
    parts = [i * 4 // len(ids) for i in range(len(ids))]
    chosen = hold_out([Batch(ids[n : n + 1], group=part) for n, part in enumerate(parts)])
    return torch.cat([batch.input_ids for batch in chosen if batch.group == HELD_OUT_GROUP])


def divergence(dense: Any, sliced: Any, ids: Tensor) -> float:
    """KL(dense || sliced) in nats per token, in float64."""
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (dense, sliced))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", [*tiny.CORE, "granite", "cohere"])
def test_the_saved_model_loses_what_the_manifest_says(
    case: str, ids: Tensor, run_slice: Slicer, dense_folder: Folders, tmp_path: Path
) -> None:
    result = sliced(case, ids, run_slice, tmp_path)
    said = result.manifest["head_gain"]
    loss = divergence(load(dense_folder(case)), load(result.output), held_out(ids))
    assert said["tokens"] == held_out(ids).numel() == 2 * 24
    assert said["kl_after"] < said["kl_before"]
    assert loss == pytest.approx(said["kl_after"], rel=1e-3)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_no_other_gain_is_better(
    case: str,
    ids: Tensor,
    run_slice: Slicer,
    dense_folder: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient of the KL by autograd, through transformers' model, vanishes."""
    monkeypatch.setattr(
        neuronfit, "CONJUGATE_GRADIENTS", 0
    )  # with them, qwen3-tied's float32 losses end L-BFGS at 1.2e-4
    monkeypatch.setattr(gains, "PULL", 0.0)
    monkeypatch.setattr(gains, "LBFGS_ITERATIONS", 300)
    result = sliced(case, ids, run_slice, tmp_path)
    dense, model = (load(folder, dtype=torch.float64) for folder in (dense_folder(case), result.output))
    rows = held_out(ids)
    gain = torch.ones(CUT["width"], dtype=torch.float64, requires_grad=True)
    states = model.model(rows).last_hidden_state.detach()
    with torch.no_grad():
        expected = dense(rows).logits.log_softmax(-1)
    actual = model.lm_head(states * gain).log_softmax(-1)
    (expected.exp() * (expected - actual)).sum(-1).mean().backward()
    assert gain.grad is not None
    assert gain.grad.abs().max() < 1e-4


def test_few_sequences_leave_the_head_as_it_is(ids: Tensor, run_slice: Slicer, tmp_path: Path) -> None:
    assert "head_gain" not in sliced("llama", ids[:7], run_slice, tmp_path).manifest


def test_nothing_is_fitted_where_nothing_is_cut(ids: Tensor, run_slice: Slicer, tmp_path: Path) -> None:
    whole = {"width": tiny.WIDTH, "neurons": None}
    assert "head_gain" not in sliced("llama", ids, run_slice, tmp_path, **whole).manifest
