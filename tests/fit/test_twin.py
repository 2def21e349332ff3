"""Fitting sliced layers beside the dense stream, against a reference on transformers' own model."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigenslice.algebra.refit import RidgeChoice
from eigenslice.arch import lookup
from eigenslice.checkpoint.source import open_source
from eigenslice.cut.blocks import ALL, SiteBasis, identity_basis, slice_block
from eigenslice.cut.ends import GlobalBasis, GlobalCut
from eigenslice.data import holdout
from eigenslice.data.batches import Batch
from eigenslice.fit import neuron_readers as neuronfit
from eigenslice.fit import reader_step
from eigenslice.fit.beside import run_beside
from eigenslice.fit.ridges import Fitting
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.importance import HEAD_WEIGHT
from eigenslice.model.dense import DenseModel, Tensors
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.plan.plan import Plan, widths
from eigenslice.slicing import SliceResult
from tests import tiny
from tests.conftest import Folders, Recipe, Slicer
from tests.reference_twin import Twin
from tests.results import load, relative
from tests.runs import run_of

WIDTH, NEURONS, RIDGE = 20, 40, 0.03
IDS = tiny.random_ids(2, 20, seed=5)
FAMILIES = ["llama-biased", "qwen2-tied", "qwen3", "opt", "phi", "gpt_neox", "gpt_neox-sequential"]


@pytest.fixture(autouse=True)
def nothing_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """References fit on all sequences, and have no gain before the head."""
    monkeypatch.setattr(holdout, "HELD_OUT_SHARE", 10_000)


def twin_of(case: str, result: SliceResult, ridge: float | None) -> Twin:
    """What the reference has to know of a result."""
    manifest, tied = result.manifest, tiny.CASES[case].tied
    layer_norm = tiny.CASES[case].model_type in ("opt", "phi", "gpt_neox")
    return Twin(
        width=manifest["plan"]["width"],
        neurons=manifest["plan"]["neurons"],
        constant=layer_norm and (tied or manifest["form"] == "stock"),
        tied=tied,
        head_weight=HEAD_WEIGHT,
        ridge=ridge,
        dropped=tuple(manifest["plan"].get("dropped_blocks", ())),
        rotated=case not in tiny.POST_NORMS or manifest["plan"]["width"] < tiny.WIDTH,
    )


def logits(result: SliceResult) -> Tensor:
    with torch.no_grad():
        return load(result.output)(IDS).logits


def check(result: SliceResult, expected: Tensor, dense: Any) -> None:
    """The result's logits are the reference's, which are far from the dense model's."""
    with torch.no_grad():
        assert relative(logits(result), expected) < 1e-4
        assert relative(dense(IDS).logits, expected) > 0.01
    assert result.manifest["refitted"]


@pytest.fixture
def constant_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RidgeChoice, "choose", lambda *_: RIDGE)


SIZES = [
    pytest.param(case, *size, id=f"{case}-{'-'.join(map(str, size))}")
    for case in tiny.CORE
    for size in [(WIDTH, NEURONS), *([(WIDTH, 56), (tiny.WIDTH, NEURONS)] if case in FAMILIES else [])]
] + [
    pytest.param(case, *size, id=f"{case}-{'-'.join(map(str, size))}")
    for case in tiny.POST_NORMS
    for size in [(WIDTH, NEURONS), (tiny.WIDTH, NEURONS)]
]


@pytest.mark.usefixtures("constant_ridge")
@pytest.mark.parametrize(("case", "width", "neurons"), SIZES)
def test_it_is_one_regression_after_the_other(
    case: str, width: int, neurons: int, run_slice: Slicer, dense_folder: Folders, calibration: Path
) -> None:
    result = run_slice(case, width=width, neurons=neurons)
    model = load(dense_folder(case), dtype=torch.float64)
    expected = twin_of(case, result, RIDGE).logits(model, load_file(calibration)["calibration"], IDS)
    check(result, expected, model)


@pytest.mark.usefixtures("constant_ridge")
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_of_many_tokens_some_have_to_do_for_the_curvature(
    case: str, run_slice: Slicer, dense_folder: Folders, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = load_file(calibration)["calibration"]
    monkeypatch.setattr(neuronfit, "CURVATURE_TOKENS", ids.numel() // 2)
    monkeypatch.setattr(neuronfit, "STEP_SHARES", (1.0,))  # of so few, a step goes too far
    result = run_slice(case, width=WIDTH, neurons=NEURONS)
    model, twin = load(dense_folder(case), dtype=torch.float64), twin_of(case, result, RIDGE)
    check(result, replace(twin, stride=2).logits(model, ids, IDS), model)
    assert relative(twin.logits(model, ids, IDS), logits(result)) > 1e-3, "it made no difference"


@pytest.mark.usefixtures("constant_ridge")
@pytest.mark.parametrize("case", ["phi", "qwen2-tied"])
def test_the_custom_class_holds_the_same_fit(
    case: str, run_slice: Slicer, dense_folder: Folders, calibration: Path
) -> None:
    result = run_slice(case, width=WIDTH, neurons=NEURONS, form="custom")
    assert result.manifest["form"] == "custom"
    model = load(dense_folder(case), dtype=torch.float64)
    expected = twin_of(case, result, RIDGE).logits(model, load_file(calibration)["calibration"], IDS)
    check(result, expected, model)


@pytest.mark.parametrize(
    ("case", "width", "neurons"),
    [
        *((case, WIDTH, NEURONS) for case in (*FAMILIES, "gemma2", "olmo2")),
        *((case, tiny.WIDTH, NEURONS) for case in ("llama", "gemma2")),
    ],
)
def test_the_ridge_is_chosen_on_groups_in_turns(
    case: str, width: int, neurons: int, run_slice: Slicer, dense_folder: Folders, calibration: Path
) -> None:
    result = run_slice(case, width=width, neurons=neurons)
    model = load(dense_folder(case), dtype=torch.float64)
    expected = twin_of(case, result, None).logits(model, load_file(calibration)["calibration"], IDS)
    check(result, expected, model)


@pytest.mark.usefixtures("constant_ridge")
@pytest.mark.parametrize(
    ("case", "dropped"),
    [(case, [1]) for case in (*FAMILIES, "glm4", "olmo2", "qwen2-window", "gemma2")]
    + [("llama", [2]), ("opt", [1, 2]), ("glm4", [1, 2]), ("qwen2-window", [2]), ("exaone4", [1])],
)
def test_the_writer_before_a_gap_is_fitted_to_the_stream_behind_it(
    case: str, dropped: list[int], run_slice: Slicer, dense_folder: Folders, calibration: Path, recipe: Recipe
) -> None:
    result = run_slice(case, recipe=recipe(width=WIDTH, neurons=NEURONS, dropped_blocks=dropped))
    assert result.manifest["plan"]["dropped_blocks"] == dropped
    model = load(dense_folder(case), dtype=torch.float64)
    expected = twin_of(case, result, RIDGE).logits(model, load_file(calibration)["calibration"], IDS)
    check(result, expected, model)


@pytest.mark.usefixtures("constant_ridge")
@pytest.mark.parametrize("case", ["llama", "opt", "phi", "gpt_neox-sequential", "glm4", "olmo2"])
def test_padding_does_not_count(case: str, run_slice: Slicer, dense_folder: Folders, tmp_path: Path) -> None:
    ids, mask = tiny.random_ids(12, 24), torch.ones(12, 24, dtype=torch.int64)
    mask[::2, :9], mask[1, 15:] = 0, 0
    file = tmp_path / "ids.safetensors"
    save_file({"calibration": ids, "attention_mask": mask}, file)
    result = run_slice(case, width=WIDTH, neurons=NEURONS, calibration=CalibrationOptions(data=str(file)))
    model, twin = load(dense_folder(case), dtype=torch.float64), twin_of(case, result, RIDGE)
    expected = twin.logits(model, ids, IDS, mask)
    check(result, expected, model)
    assert relative(twin.logits(model, ids, IDS), expected) > 0.01, "it would have made no difference"


def divergence(sliced: Any, dense: Any, ids: Tensor) -> float:
    """KL(dense || sliced) in nats per token."""
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (dense, sliced))
    return float((p.exp() * (p - q)).sum(-1).mean())


SOME_CUT = [(24, 56), (tiny.WIDTH, 32), (24, 40)]
CUT = [(case, *size) for case in (*FAMILIES, "llama-tied", "phi-tied") for size in SOME_CUT]


@pytest.mark.parametrize(("case", "width", "neurons"), [*CUT, ("gemma4_text", 24, None)])
def test_it_brings_the_result_nearer_to_the_dense_model_on_other_tokens(
    case: str, width: int, neurons: int | None, run_slice: Slicer, dense_folder: Folders, tmp_path: Path
) -> None:
    file = tmp_path / "ids.safetensors"
    save_file({"calibration": tiny.structured_ids(40, 32, seed=1)}, file)
    held_out, dense = tiny.structured_ids(20, 32, seed=2), load(dense_folder(case))
    options = {"width": width, "neurons": neurons, "calibration": CalibrationOptions(data=str(file))}
    results = [run_slice(case, refit=refit, **options) for refit in (True, False)]
    assert [result.manifest["refitted"] for result in results] == [True, False]
    fitted, plain = (divergence(load(result.output), dense, held_out) for result in results)
    assert 0 < fitted < 0.9 * plain


def run_twin(
    dense: DenseModel, batches: list[Batch], basis: SiteBasis, folder: Path, trial: Iterable[int] = ()
) -> tuple[SlicedTwin, list[Tensors], list[Tensor]]:
    """A twin that walked with the dense model, all neurons kept, the blocks that it wrote, and its last streams."""
    blocks: list[Tensors] = []

    def write(index: int, tensors: Tensors) -> None:
        assert index == len(blocks)
        blocks.append(tensors)

    plan = Plan(
        "global",
        widths(dense.anatomy, "global", basis.width),
        False,
        None,
        (dense.anatomy.neuron_count,) * dense.anatomy.block_count,
        rotated=basis.rotated,
    )
    cut = GlobalCut(plan, GlobalBasis(basis, None), [ALL] * dense.anatomy.block_count)
    fitting, run = Fitting({batch.group for batch in batches} - set(trial)), run_of(dense, batches, folder)
    twin = SlicedTwin(run, cut, fitting, write)
    for _ in run_beside(run, batches, {"twin": twin}, stage="fit", position=None, report=run.report("fit")):
        pass
    return twin, blocks, list(twin.streams)


def in_groups(*seeds: int) -> list[Batch]:
    return [Batch(tiny.random_ids(4, 24, seed), group=group) for group, seed in enumerate(seeds)]


@pytest.mark.parametrize("case", [*tiny.CORE, *tiny.POST_NORMS])
def test_with_nothing_cut_it_is_the_dense_model(case: str, dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    twin, blocks, _ = run_twin(dense, in_groups(1, 2, 3), identity_basis(tiny.WIDTH, "cpu"), tmp_path)
    assert len(blocks) == dense.anatomy.block_count
    for index, tensors in enumerate(blocks):
        expected = dense.block(index)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-3, atol=1e-4)
    assert twin.reading is not None
    torch.testing.assert_close(twin.reading, torch.eye(tiny.WIDTH), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "gpt_neox", *tiny.POST_NORMS])
def test_with_nothing_cut_it_is_the_rotated_dense_model(case: str, dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    basis = SiteBasis(torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).double())[0])
    _, blocks, _ = run_twin(dense, in_groups(1, 2, 3), basis, tmp_path)
    sites = dense.anatomy.sites
    for index, tensors in enumerate(blocks):
        expected = dict(slice_block(sites, dense.block(index), [basis] * (len(sites) + 1), shortcuts=False))
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
def test_nothing_is_fitted_on_trial_groups(case: str, dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    basis = SiteBasis(torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(0)).double())[0])
    batches = in_groups(1, 2, 3)
    (_, alone, _), (_, tried, streams), (_, all_three, _) = (
        run_twin(dense, batches[:2], basis, tmp_path),
        run_twin(dense, batches, basis, tmp_path, trial=[2]),
        run_twin(dense, batches, basis, tmp_path),
    )
    for some, same, other in zip(alone, tried, all_three, strict=True):
        for name in some:
            assert torch.equal(some[name], same[name])
        assert any(not torch.allclose(some[name], other[name], atol=1e-3) for name in some)
    assert [stream.shape for stream in streams] == [(4, 24, 20)] * 3


def inputs_of(model: Any, names: list[str], ids: Tensor) -> list[Tensor]:
    """What these modules are given, one token a row, in float64."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.update({name: args[0].reshape(ids.numel(), -1).double()})

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


@pytest.mark.parametrize("case", ["llama-biased", "opt-untied", "gpt_neox", "gpt_neox-sequential"])
def test_after_a_site_nothing_is_missing_that_its_writers_could_write(
    case: str, run_slice: Slicer, dense_folder: Folders, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a ridge, what is missing is orthogonal to all that was written from, and its mean is zero.

    Not so once what was written from has changed, so that readers aren't fitted here.
    """
    monkeypatch.setattr(neuronfit, "CONJUGATE_GRADIENTS", 0)
    monkeypatch.setattr(RidgeChoice, "choose", lambda *_: 1e-7)
    result, ids = run_slice(case, width=WIDTH, neurons=NEURONS, form="custom"), load_file(calibration)["calibration"]
    sliced, dense = load(result.output), load(dense_folder(case))
    table = lookup(dense.config)
    layers = [f"{table.layers}.{index}" for index in range(3)]
    places = [(layer, site) for layer in layers for site in table.sites(dense.config)]
    norms = [*(f"{layer}.{site[0].norm}" for layer, site in places), table.final_norm]
    writers = [[f"model.{layer}.{sublayer.writers[0]}" for sublayer in site] for layer, site in places]
    wanted, had = inputs_of(dense, norms, ids), inputs_of(sliced, [f"model.{name}" for name in norms], ids)
    if table.norm == "layer":
        wanted = [x - x.mean(-1, keepdim=True) for x in wanted]
    # Nothing is fitted before the first site: there the sliced stream is c X Q
    basis = torch.linalg.lstsq(wanted[0], had[0], driver="gelsd").solution
    for x, z, names in zip(wanted[1:], had[1:], writers, strict=True):
        size = x.square().mean(-1, keepdim=True).sqrt()
        a = torch.cat([*inputs_of(sliced, names, ids), torch.ones(len(x), 1)], dim=1) / size
        missing = (x @ basis - z) / size
        assert missing.norm() > 0.1 * (x / size).norm() * (WIDTH / tiny.WIDTH) ** 0.5
        assert (a.T @ missing / a.norm(dim=0)[:, None]).abs().max() < 1e-3 * missing.norm()


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_the_manifest_has_the_errors_that_are_left(
    case: str, run_slice: Slicer, dense_folder: Folders, calibration: Path
) -> None:
    """Against transformers' hidden states of both models; the last ones are behind the final norm there."""
    result = run_slice(case, width=WIDTH, neurons=NEURONS)
    entries = result.manifest["refit_errors"]
    model, sliced = (load(folder, dtype=torch.float64) for folder in (dense_folder(case), result.output))
    scale = (WIDTH / tiny.WIDTH) ** 0.5
    embeddings = (m.get_input_embeddings().weight.detach() for m in (model, sliced))
    basis = torch.linalg.lstsq(*embeddings).solution / scale
    ids = load_file(calibration)["calibration"]
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True).hidden_states[1:-1] for m in (model, sliced)]
    blocks = model.config.num_hidden_layers
    assert [entry["block"] for entry in entries] == list(range(blocks))
    assert blocks > 1
    for entry, dense, small in zip(entries, *states, strict=False):
        size = dense.square().sum(-1)
        error = ((dense - small / scale @ basis.T).square().sum(-1) / size).mean()
        kept = ((dense @ basis).square().sum(-1) / size).mean()
        assert entry["error"] == pytest.approx(float(error), rel=1e-3)
        assert entry["energy_kept"] == pytest.approx(float(kept), rel=1e-3)


@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_a_step_of_readers_that_loses_is_not_taken(
    case: str, run_slice: Slicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def fit(*arguments: Any) -> tuple[dict[str, Tensor], float]:
            found, before = neuronfit.fit_readers(*arguments)
            return {name: change(tensor) for name, tensor in found.items()}, before

        monkeypatch.setattr(reader_step, "fit_readers", fit)
        result = run_slice(case, width=WIDTH, neurons=NEURONS)
        return list(load_file(result.output / "model.safetensors").values())

    none, half, whole, wrong, twice = (
        weights(lambda step, share=share: share * step) for share in (0.0, 0.5, 1.0, -1.0, 2.5)
    )
    assert all(map(torch.equal, none, wrong))
    assert not all(map(torch.equal, none, whole))
    assert not all(map(torch.equal, none, twice)), "a part of it gains"
    assert not all(map(torch.equal, half, whole))
