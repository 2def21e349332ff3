"""The stream is transformers' residual stream, block by block; padding doesn't count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenslice.checkpoint.source import open_source
from eigenslice.data.batches import Batch
from eigenslice.errors import ActivationError, CheckpointError
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import slice_model
from eigenslice.stream.runner import captured_inputs
from eigenslice.stream.walk import Stream
from tests import tiny
from tests.checkpoint.files import copy_of
from tests.conftest import Folders
from tests.messages import check_message
from tests.results import load


def site_inputs(model: Any, names: list[str], ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """What the dense model's norms are given, in float64, in the order in which they run."""
    seen: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].double().view(*ids.shape, -1)),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return seen


def norms(dense: DenseModel) -> list[str]:
    """Names of the norms at the dense model's sites."""
    sites = dense.anatomy.sites
    blocks = [
        f"{dense.table.layers}.{i}.{site[0].norm or site[0].modules[0]}"
        for i in range(dense.anatomy.block_count)
        for site in sites
    ]
    return [*blocks, dense.table.final_norm]


@pytest.mark.parametrize(
    ("case", "padded"), [*((case, True) for case in tiny.CASES), *((case, False) for case in tiny.CORE)]
)
def test_moments_are_those_of_the_dense_models_norm_inputs(
    case: str, padded: bool, dense_folder: Callable[[str], Path]
) -> None:
    folder = dense_folder(case)
    dense = DenseModel(open_source(str(folder)))
    ids = tiny.random_ids(3, 18)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        mask[2, :11] = 0
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    expected = site_inputs(load(folder), norms(dense), ids, mask)
    stream = Stream(dense, torch.float32)
    count = 0
    for site, x in zip(stream.walk([Batch(ids, mask)]), expected, strict=True):
        rows = x[real]
        if dense.anatomy.layer_norm:
            rows = rows - rows.mean(-1, keepdim=True)
        torch.testing.assert_close(site.moment(normalized=False), rows.T @ rows, rtol=1e-4, atol=1e-3)
        normal = rows / (rows.square().mean(-1, keepdim=True) + dense.anatomy.eps).sqrt()
        torch.testing.assert_close(site.moment(normalized=True), normal.T @ normal, rtol=1e-4, atol=1e-3)
        count += 1
    assert count == len(norms(dense))


def test_batches_of_different_length_add_up(dense_folder: Callable[[str], Path]) -> None:
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    batches = [Batch(tiny.random_ids(2, 18)), Batch(tiny.random_ids(1, 9, seed=11))]

    def moments(some: list[Batch]) -> list[torch.Tensor]:
        stream = Stream(dense, torch.float32)
        return [site.moment(normalized=True) for site in stream.walk(some)]

    for both, first, second in zip(moments(batches), moments(batches[:1]), moments(batches[1:]), strict=True):
        torch.testing.assert_close(both, first + second, rtol=1e-6, atol=1e-6)


def test_nan_names_the_block(dense_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny.save(tiny.CASES["llama"].build(), tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stream = Stream(DenseModel(open_source(str(folder))), torch.float32)
    with pytest.raises(ActivationError, match=r"block 1 .*NaN or infinite"):
        list(stream.walk([Batch(tiny.random_ids(1, 8))]))


def test_inputs_are_captured_with_or_without_what_follows(dense_folder: Callable[[str], Path]) -> None:
    layer = load(dense_folder("llama")).model.layers[0]
    called: list[str] = []
    for name in ("gate_proj", "down_proj"):
        getattr(layer.mlp, name).register_forward_hook(lambda module, args, output, name=name: called.append(name))
    x = torch.randn(2, 5, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    with captured_inputs(layer, ["mlp.down_proj"]) as whole:
        layer.mlp(x)
    assert called == ["gate_proj", "down_proj"]
    with captured_inputs(layer, ["mlp.gate_proj", "mlp.down_proj"], stop=True) as stopped:
        layer.mlp(x)
    assert called == ["gate_proj", "down_proj", "gate_proj"]
    assert torch.equal(stopped["mlp.gate_proj"], x)
    assert torch.equal(stopped["mlp.down_proj"], whole["mlp.down_proj"])
    layer.mlp(x)  # nothing is left behind
    assert called[-1] == "down_proj"


@pytest.mark.parametrize(
    ("case", "changes"),
    [("gpt_oss", {"sliding_window": None}), ("codegen", {"rotary_dim": 3})],
    ids=["a window that is missing", "an odd rotary dimension"],
)
def test_a_config_that_can_be_built_and_not_run_is_one_message(
    case: str, changes: dict[str, Any], dense_folder: Folders, calibration: Path, tmp_path: Path
) -> None:
    folder = copy_of(dense_folder(case), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    data = CalibrationOptions(data=str(calibration))
    with pytest.raises(CheckpointError) as caught:
        slice_model(SliceOptions(model=str(folder), output=tmp_path / "out", width=24, calibration=data))
    check_message(caught.value, "transformers can't run")
