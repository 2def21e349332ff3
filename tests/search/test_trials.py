"""Plans tried: that the loss is that of the model as saved."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from eigenslice.algebra.refit import RidgeChoice
from eigenslice.checkpoint.source import open_source
from eigenslice.data import holdout
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.data.holdout import trial_batches
from eigenslice.fit import neuron_readers as neuronfit
from eigenslice.fit.working_memory import working_bytes
from eigenslice.measure.importance import measure
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.plan.forms import choose_form
from eigenslice.plan.plan import Plan, Sizes
from eigenslice.search import trials
from eigenslice.search.trials import TOGETHER, plans_at_once, try_plans
from eigenslice.stream.run import Run
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load
from tests.runs import run_of


def divergence(dense: Any, sliced: Any, ids: Tensor, mask: Tensor | None) -> float:
    """KL(dense || sliced) in nats per token that counts."""
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        p, q = (model(ids, attention_mask=mask).logits.double().log_softmax(-1)[real] for model in (dense, sliced))
    return float((p.exp() * (p - q)).sum(-1).mean())


def plans_of(dense: DenseModel, sizes: list[tuple[int, int]]) -> list[Plan]:
    return [choose_form(dense.anatomy, Sizes(*size), tied=dense.anatomy.tied) for size in sizes]


def tried(run: Run, plans: list[Plan], batches: list[Batch], *, refit: bool = True) -> list[float]:
    """Losses, with basis and neurons from the run's tokens, which are fitted on."""
    return try_plans(run, plans, measure(run), batches, fits=refit)


@pytest.mark.parametrize(
    ("case", "padded", "refit"),
    [
        *((case, False, True) for case in tiny.CORE),
        *((case, True, True) for case in ("llama", "opt", "gpt_neox")),
        *((case, False, False) for case in ("llama", "opt")),
    ],
)
def test_the_loss_is_that_of_the_model_that_would_be_saved(
    case: str,
    padded: bool,
    refit: bool,
    run_slice: Slicer,
    dense_folder: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slicing with the tokens that were fitted on, to the same plan, gives a model that loses as much elsewhere."""
    monkeypatch.setattr(RidgeChoice, "choose", lambda *_: 0.1)
    monkeypatch.setattr(holdout, "HELD_OUT_SHARE", 100)  # trials fit no gain before the head, either, ...
    monkeypatch.setattr(neuronfit, "CONJUGATE_GRADIENTS", 0)  # ... nor what neurons read
    folder = dense_folder(case)
    dense, model = DenseModel(open_source(str(folder))), load(folder)
    ids, held_out = tiny.random_ids(12, 24, seed=1), tiny.random_ids(5, 24, seed=2)
    mask, held_mask = torch.ones_like(ids), torch.ones_like(held_out)
    if padded:
        mask[::3, :9], held_mask[0, :9], held_mask[3, 4:] = 0, 0, 0
    fit = [Batch(ids[i : i + 3], mask[i : i + 3] if padded else None, i % 4) for i in range(0, 12, 3)]
    trial = [Batch(held_out[i : i + 1], held_mask[i : i + 1] if padded else None, HELD_OUT_GROUP) for i in range(5)]
    plans = plans_of(dense, [(24, 56), (tiny.WIDTH, 32), (20, 40)])
    losses = tried(run_of(dense, fit, tmp_path), plans, [*fit[:2], *trial[:3], *fit[2:], *trial[3:]], refit=refit)
    file = tmp_path / "fit.safetensors"
    save_file({"calibration": ids, "attention_mask": mask}, file)
    for number, (plan, loss) in enumerate(zip(plans, losses, strict=True)):
        recipe = tmp_path / f"recipe-{number}.yaml"
        recipe.write_text(yaml.safe_dump(plan.describe()))
        result = run_slice(case, recipe=recipe, calibration=CalibrationOptions(data=str(file)), refit=refit)
        expected = divergence(model, load(result.output), held_out, held_mask if padded else None)
        assert loss == pytest.approx(expected, rel=1e-3)
        assert loss > 1e-3


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "opt", "phi", "gpt_neox", "gpt_neox-sequential"])
def test_nothing_is_lost_where_nothing_is_cut(case: str, dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    plans = plans_of(dense, [(24, 56), (tiny.WIDTH, 56), (tiny.WIDTH, 48)])
    batches = trial_batches([Batch(tiny.random_ids(3, 24, seed), group=seed) for seed in range(4)])
    losses = tried(run_of(dense, [b for b in batches if b.group != HELD_OUT_GROUP], tmp_path), plans, batches)
    assert abs(losses[1]) < 1e-6
    assert min(losses[0], losses[2]) > 1e-4


def test_each_plan_is_tried_as_if_alone(dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder("qwen3"))))
    plans = plans_of(dense, [(24, 56), (20, 32), (16, 48)])
    batches = trial_batches([Batch(tiny.random_ids(3, 24, seed), group=seed) for seed in range(4)])
    together = tried(run_of(dense, batches, tmp_path), plans, batches)
    alone = [tried(run_of(dense, batches, tmp_path), [plan], batches)[0] for plan in plans]
    assert together == pytest.approx(alone, rel=1e-6)


def test_as_many_plans_at_once_as_fit_into_memory(
    dense_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    plans = plans_of(dense, [(24, 56), (20, 32)])

    def at_once(free: int, run: Run | None = None) -> int:
        monkeypatch.setattr(trials, "free_bytes", lambda device: free)
        return plans_at_once(run or run_of(dense, [], tmp_path), plans)

    one, two, four = (working_bytes(dense.anatomy, torch.float32, 56, count) for count in (1, 2, TOGETHER))
    assert two - one == 4 * max(dense.anatomy.block_sizes)
    assert at_once(10**9) == at_once(int(1.2 * four)) == TOGETHER
    assert at_once(0) == 1
    run = run_of(dense, [], tmp_path)
    assert at_once(int(1.2 * two), run) == 2
    assert at_once(10**9, run) == 2, "the number lasts as long as the run"


@pytest.mark.parametrize(("rows", "padding"), [(1, []), (2, []), (3, [2]), (3, [0, 1])])
def test_few_sequences_are_enough_for_keep(rows: int, padding: list[int], run_slice: Slicer, tmp_path: Path) -> None:
    mask = torch.ones(rows, 50, dtype=torch.int64)
    mask[padding] = 0
    file = tmp_path / "few.safetensors"
    save_file({"calibration": tiny.random_ids(rows, 50), "attention_mask": mask}, file)
    with warnings.catch_warnings(action="ignore"):
        result = run_slice("llama", keep=0.7, calibration=CalibrationOptions(data=str(file)))
    assert len(result.manifest["trials"]) > 1
    assert all(0 < trial["kl"] < 10 for trial in result.manifest["trials"])
    assert result.manifest["parameters"]["kept"] <= 0.7
