"""Slicing below full width: against the reference, honest sizes, the manifest, and what is in the folder."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.arch import TABLES
from eigenslice.errors import OptionsError, OutputError
from eigenslice.measure.importance import HEAD_WEIGHT
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import slice_model
from tests import reference, tiny
from tests.conftest import Folders, Slicer
from tests.results import load, relative, size, stored_tensors

WIDTH = 20


def costs_a_dimension(case: str, stock: bool) -> bool:
    """Whether coordinates have to sum to zero: for a stock LayerNorm, and for experts behind a norm's shift."""
    table = TABLES[tiny.CASES[case].model_type]
    return table.norm == "layer" and (stock or bool(table.mlp.stacked))


@pytest.mark.parametrize("case", tiny.CASES)
def test_per_block_is_the_papers_algorithm(
    case: str, run_slice: Slicer, dense_folder: Callable[[str], Path], calibration: Path
) -> None:
    result = run_slice(case, width=WIDTH, basis="per-block")
    ids = tiny.random_ids(2, 20, seed=5)
    model = reference.load_wide(dense_folder(case), tiny.CASES[case].widest)
    last = TABLES[tiny.CASES[case].model_type].one_width
    assert result.manifest["site_widths"][-1] == (WIDTH if last else tiny.WIDTH)
    kept = WIDTH - costs_a_dimension(case, stock=False)
    expected = reference.per_block_logits(model, load_file(calibration)["calibration"], ids, kept, last)
    with torch.no_grad():
        assert relative(load(result.output)(ids).logits, expected) < 1e-3


RMS_OR_UNTIED = [
    name for name, case in tiny.CASES.items() if not (case.tied and TABLES[case.model_type].norm == "layer")
]


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, "auto") for case in RMS_OR_UNTIED]
    + [(case, "custom") for case in RMS_OR_UNTIED if case in tiny.CORE and tiny.CASES[case].stock],
)
def test_global_without_refit_is_projection_onto_one_subspace(
    case: str, form: str, run_slice: Slicer, dense_folder: Callable[[str], Path], calibration: Path
) -> None:
    result = run_slice(case, width=WIDTH, form=form, refit=False)
    assert not result.manifest["refitted"]
    ids = tiny.random_ids(2, 20, seed=5)
    model = reference.load_wide(dense_folder(case), tiny.CASES[case].widest)
    # a stock LayerNorm needs one of its dimensions for the constant vector
    kept = WIDTH - costs_a_dimension(case, result.manifest["form"] == "stock")
    tokens = load_file(calibration)["calibration"]
    tied = tiny.CASES[case].tied
    expected = reference.global_logits(model, tokens, ids, kept, HEAD_WEIGHT, tied)
    with torch.no_grad():
        assert relative(load(result.output)(ids).logits, expected) < 1e-3


@pytest.mark.parametrize("case", ["opt", "phi-tied", "gpt_neox-tied"])
def test_tied_behind_layer_norms_differs_from_untied_by_the_cut_only(
    case: str, run_slice: Slicer, dense_folder: Callable[[str], Path]
) -> None:
    """The wider, the nearer to the dense model; tied costs a dimension and the gain outside of the subspace."""
    ids = tiny.random_ids(2, 20, seed=5)
    dense = load(dense_folder(case))
    with torch.no_grad():
        expected = dense(ids).logits
        errors = [relative(load(run_slice(case, width=w).output)(ids).logits, expected) for w in (16, 24, 31, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[-2]


@pytest.mark.parametrize(
    ("case", "basis"), [*((case, "global") for case in tiny.CASES), *((case, "per-block") for case in tiny.CORE)]
)
def test_counted_parameters_are_the_stored_ones_and_in_the_expected_form(
    case: str, basis: str, run_slice: Slicer, dense_folder: Callable[[str], Path]
) -> None:
    """Stock wherever the config can hold the result, the custom class elsewhere."""
    result = run_slice(case, width=24, basis=basis)
    counts = result.manifest["parameters"]
    stored = stored_tensors(result.output)
    assert counts["stored"] == sum(map(math.prod, stored.values())) == sum(counts["by_role"].values())
    assert counts["stored"] == size(load(result.output))
    assert counts["dense"] == size(load(dense_folder(case)))
    assert counts["kept"] == counts["stored"] / counts["dense"]
    stock = tiny.CASES[case].stock if basis == "global" else None
    assert result.manifest["form"] == ("stock" if stock else "custom")
    assert result.manifest["model_type"] == (stock or "eigenslice")


@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("basis", ["global", "per-block"])
@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "opt", "phi", "gpt_neox"])
def test_keep_without_mlp_is_the_widest_of_that_size(
    case: str, basis: str, keep: float, run_slice: Slicer, none_held_out: CalibrationOptions
) -> None:
    result = run_slice(case, keep=keep, basis=basis, mlp=False, calibration=none_held_out)
    kept = result.manifest["parameters"]["kept"]
    assert kept <= keep
    assert result.manifest["trials"] == []
    assert result.manifest["plan"]["neurons"] == 56
    width = result.manifest["site_widths"][0]
    if width + 8 <= tiny.WIDTH:  # and the next wider one wouldn't fit
        wider = run_slice(case, width=width + 8, basis=basis, refit=False, calibration=none_held_out)
        assert wider.manifest["parameters"]["kept"] > keep


@pytest.mark.parametrize("keep", [0.8, 0.7])
@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "opt", "phi", "gpt_neox"])
def test_keep_takes_the_plan_that_loses_least(case: str, keep: float, run_slice: Slicer) -> None:
    result = run_slice(case, keep=keep)
    manifest = result.manifest
    trials = [dict(trial) for trial in manifest["trials"]]
    losses = [trial.pop("kl") for trial in trials]
    assert len(trials) > 1
    assert all(trial not in trials[:number] for number, trial in enumerate(trials))
    assert manifest["plan"] == trials[losses.index(min(losses))]
    neurons, heads = manifest["plan"]["neurons"], manifest["plan"].get("key_value_heads")
    fewest = min(neurons) if isinstance(neurons, list) else neurons
    assert manifest["plan"]["width"] < tiny.WIDTH or fewest < 56 or heads is not None
    assert manifest["parameters"]["kept"] <= keep
    assert manifest["parameters"]["stored"] == sum(map(math.prod, stored_tensors(result.output).values()))
    assert manifest["site_widths"] == [manifest["plan"]["width"]] * len(manifest["site_widths"])


def test_per_block_keeps_all_neurons(run_slice: Slicer) -> None:
    """As in the paper: with or without `mlp`, it is the same."""
    one, two = (run_slice("llama", keep=0.8, basis="per-block", mlp=mlp).manifest for mlp in (True, False))
    assert one["plan"] == two["plan"]
    assert one["trials"] == two["trials"] == []
    assert not one["refitted"]


def test_keep_of_everything_keeps_everything(run_slice: Slicer) -> None:
    manifest = run_slice("llama", keep=1.0).manifest
    assert manifest["plan"] == {"basis": "global", "width": tiny.WIDTH, "neurons": 56, "tied": False}
    assert (manifest["trials"], manifest["refitted"]) == ([], False)


def test_slicing_is_the_papers_measure(run_slice: Slicer) -> None:
    assert run_slice("llama", slicing=0.25).manifest["site_widths"] == [24] * 7
    widths = run_slice("llama", slicing=0.25, basis="per-block").manifest["site_widths"]
    assert widths == [24] * 6 + [tiny.WIDTH]


def test_llama_at_a_width_its_config_refuses_becomes_mistral(run_slice: Slicer) -> None:
    result = run_slice("llama", width=22)
    assert result.manifest["model_type"] == "mistral"
    assert json.loads((result.output / "config.json").read_text())["sliding_window"] is None


def test_llama_with_biases_at_such_a_width_becomes_custom(run_slice: Slicer) -> None:
    assert run_slice("llama-biased", width=22).manifest["form"] == "custom"


def test_qwen2_at_such_a_width_stays_qwen2_and_says_it_is_not_portable(run_slice: Slicer) -> None:
    manifest = run_slice("qwen2", width=22).manifest
    assert (manifest["model_type"], manifest["portable"]) == ("qwen2", False)


@pytest.mark.parametrize("size", [{"width": 24}, {"width": 24, "neurons": 40}, {"keep": 0.7}], ids=str)
def test_the_same_options_give_the_same_bytes(size: dict, run_slice: Slicer) -> None:
    results = [run_slice("qwen2-tied", **size) for _ in range(2)]
    for file in ("model.safetensors", "config.json"):
        digests = {hashlib.sha256((result.output / file).read_bytes()).hexdigest() for result in results}
        assert len(digests) == 1
    assert results[0].manifest["trials"] == results[1].manifest["trials"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_in_the_models_dtype(dtype: str, run_slice: Slicer, tmp_path: Path) -> None:
    model = tiny.CASES["llama"].build(getattr(torch, dtype))
    result = run_slice("llama", model=str(tiny.save(model, tmp_path / "half")), width=tiny.WIDTH)
    assert result.manifest["dtype"] == dtype
    config = json.loads((result.output / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert {t.dtype for t in load_file(result.output / "model.safetensors").values()} == {getattr(torch, dtype)}
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        sliced = load(result.output, dtype=torch.float32)(ids).logits
        assert relative(sliced, model.float()(ids).logits) < 0.03


def test_shards_load(run_slice: Slicer) -> None:
    whole, sharded = run_slice("opt", width=24), run_slice("opt", width=24, shard_gib=1e-5)
    assert len(list(sharded.output.glob("model-*.safetensors"))) > 3
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        assert torch.equal(load(whole.output)(ids).logits, load(sharded.output)(ids).logits)


def test_manifest_explains_the_result(
    run_slice: Slicer, dense_folder: Callable[[str], Path], calibration: Path
) -> None:
    result = run_slice("llama", width=24, basis="per-block")
    manifest = json.loads((result.output / "eigenslice.json").read_text())
    assert manifest == json.loads(json.dumps(result.manifest))
    weights = (dense_folder("llama") / "model.safetensors").read_bytes()
    assert manifest["source"]["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert manifest["calibration"]["tokens"] == 12 * 24
    assert manifest["options"]["width"] == 24
    assert manifest["plan"] == {"basis": "per-block", "width": 24, "neurons": 56, "tied": False}
    assert (manifest["refitted"], manifest["trials"]) == (False, [])
    assert len(manifest["spectra"]) == 6
    for site in manifest["spectra"]:
        values = list(site["eigenvalues"].values())
        assert values == sorted(values, reverse=True)
        assert 0 < site["energy_kept"] < 1


def test_rotary_base_is_written_for_older_transformers(run_slice: Slicer, tmp_path: Path) -> None:
    config = tiny.LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}
    folder = tiny.save(tiny.tiny_model("llama", config), tmp_path / "rope")
    written = json.loads((run_slice("llama", model=str(folder), width=24).output / "config.json").read_text())
    assert written["rope_theta"] == 5000.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    phi = json.loads((run_slice("phi", width=24).output / "config.json").read_text())
    assert (phi["rope_theta"], phi["partial_rotary_factor"]) == (10000.0, 0.5)


def test_each_step_says_how_far_it_is(dense_folder: Folders, calibration: Path, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}
    data = CalibrationOptions(data=str(calibration))
    options = SliceOptions(model=str(dense_folder("llama")), output=tmp_path / "out", calibration=data, width=24)
    slice_model(options, lambda stage, done, total, tokens=0: last.update({stage: (done, total)}))
    assert list(last) == ["measuring", "slicing", "head", "predicting", "checking"]
    assert all(done == total > 0 for done, total in last.values())


def test_input_is_never_written_to(run_slice: Slicer, dense_folder: Callable[[str], Path]) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in dense_folder("llama").rglob("*")}
    run_slice("llama", width=24)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in dense_folder("llama").rglob("*")}


def test_existing_output_is_refused(run_slice: Slicer, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        run_slice("llama", width=24, output=tmp_path / "there")


@pytest.mark.parametrize("size", [{"width": 0}, {"width": 33}, {"width": -8}, {"keep": 0.001}])
def test_sizes_that_no_width_reaches_are_refused(size: dict, run_slice: Slicer) -> None:
    with pytest.raises(OptionsError, match=r"allowed:.*\n.*next:"):
        run_slice("llama", **size)


def test_stock_on_request_is_refused_where_none_fits(run_slice: Slicer) -> None:
    with pytest.raises(OptionsError, match="no stock config can hold width 24"):
        run_slice("opt", width=24, form="stock")


@pytest.mark.parametrize("basis", ["global", "per-block"])
@pytest.mark.parametrize("case", ["llama", "opt"])
def test_compute_dtype_chooses_the_basis_and_nothing_else(
    case: str, basis: str, run_slice: Slicer, dense_folder: Callable[[str], Path]
) -> None:
    """In bfloat16 the covariances are coarse, but the transformed weights stay exact."""
    result = run_slice(case, width=tiny.WIDTH, basis=basis, compute_dtype="bfloat16")
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        expected = load(dense_folder(case))(ids).logits
        assert (load(result.output)(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
