"""Leaving out blocks: what is left is the dense model without those that it can best do without."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.algebra.refit import DEFAULT_RIDGE
from eigenslice.checkpoint.source import open_source
from eigenslice.data.batches import HELD_OUT_GROUP, Batch
from eigenslice.errors import OptionsError
from eigenslice.fit.normed_writers import DAMPING
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.plan.checks import check_dropped
from eigenslice.search.depth import missed_least
from eigenslice.stream.runner import captured_inputs
from tests import tiny
from tests.conftest import Folders, Recipe, Slicer
from tests.messages import check_message
from tests.reference import without_block
from tests.results import load, relative
from tests.runs import run_of

EPS = 1e-5  # of the tiny models; beside their streams it hardly counts
TYPES = {case.model_type: name for name, case in reversed(tiny.CASES.items())}
"""The first case of each type."""
WRITERS = {"llama": ["mlp.down_proj"], "opt": ["fc2"], "phi": ["self_attn.dense", "mlp.fc2"]}
"""Of the last site of a block."""
NORMED_WRITERS = {
    case: ("mlp.down_proj", norm)
    for case, norm in (("glm4", "post_mlp_layernorm"), ("olmo2", "post_feedforward_layernorm"))
}
"""The last writer of a block, and the norm behind it."""


def without(model: Any, block: int, layers: str) -> Any:
    """Transformers' model without a decoder layer."""
    kept = model.get_submodule(layers)
    del kept[block]
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_without_refit_it_is_the_dense_model_without_a_block(
    model_type: str, run_slice: Slicer, dense_folder: Folders, recipe: Recipe, none_held_out: CalibrationOptions
) -> None:
    case, ids = TYPES[model_type], tiny.random_ids(2, 20, seed=5)
    config = open_source(str(dense_folder(case))).config
    alone = getattr(config, "layer_types", None) == ["linear_attention", "full_attention", "linear_attention"]
    block = 2 if alone else 1  # a recurrent model needs its only block with attention
    result = run_slice(case, recipe=recipe(dropped_blocks=[block]), refit=False, calibration=none_held_out)
    sliced, model = load(result.output), load(dense_folder(case))
    assert sliced.config.num_hidden_layers == model.config.num_hidden_layers - 1
    with torch.no_grad():
        whole, expected = model(ids).logits, without_block(model, block)(ids, use_cache=False).logits
        assert relative(sliced(ids).logits, expected) < 1e-4
        assert relative(whole, expected) > 1e-3
        first = sliced(ids[:, :12], use_cache=True)
        rest = sliced(ids[:, 12:], past_key_values=first.past_key_values)
        assert relative(torch.cat([first.logits, rest.logits], dim=1), expected) < 1e-4


def test_blocks_that_depend_on_their_number_stay(dense_folder: Folders) -> None:
    config = open_source(str(dense_folder("gpt2"))).config
    assert Anatomy.of_config(config).can_drop_blocks
    config.scale_attn_by_inverse_layer_idx = True
    anatomy = Anatomy.of_config(config)
    assert not anatomy.can_drop_blocks
    with pytest.raises(OptionsError, match="leaves out the blocks") as error:
        check_dropped(anatomy, "global", [1])
    check_message(error.value)
    assert "scale_attn_by_inverse_layer_idx" in error.value.allowed


@pytest.mark.parametrize("case", WRITERS)
def test_a_block_s_loss_is_that_of_the_model_with_the_writer_before_it_refitted(
    case: str, dense_folder: Folders, tmp_path: Path
) -> None:
    folder = dense_folder(case)
    dense, model = DenseModel(open_source(str(folder))), load(folder, dtype=torch.float64)
    fit, held_out = tiny.random_ids(12, 24, seed=1), tiny.random_ids(4, 24, seed=2)
    batches = [Batch(fit), Batch(held_out, group=HELD_OUT_GROUP)]
    found = missed_least(run_of(dense, [], tmp_path), 9, batches)
    assert list(found.values()) == sorted(found.values())
    names = [f"{dense.table.layers}.{n}" for n in range(dense.anatomy.block_count)]
    norm, last = dense.table.attention.norm, dense.table.final_norm
    assert norm
    with torch.no_grad():
        dense_logits = model(held_out).logits.log_softmax(-1)
        for block in range(1, dense.anatomy.block_count):
            follows = f"{names[block + 1]}.{norm}" if block + 1 < dense.anatomy.block_count else last
            writers = [f"{names[block - 1]}.{writer}" for writer in WRITERS[case]]
            skipped, behind = f"{names[block]}.{norm}", follows
            with captured_inputs(model, [*writers, skipped, behind]) as seen:
                model(fit)
            inputs = torch.cat([seen[name].flatten(0, -2) for name in writers], dim=1)
            streams = [seen[name].flatten(0, -2) for name in (skipped, behind)]
            streams = [x - x.mean(-1, keepdim=True) if dense.anatomy.layer_norm else x for x in streams]
            share = (streams[1].square().mean(-1, keepdim=True) + EPS).rsqrt()
            a, y = share * inputs, share * (streams[1] - streams[0])
            level = DEFAULT_RIDGE * a.square().sum() / a.shape[1]
            change = torch.linalg.solve(a.T @ a + level * torch.eye(a.shape[1]), a.T @ y).T
            bridged = load(folder, dtype=torch.float64)
            for name, piece in zip(writers, change.split([seen[n].shape[-1] for n in writers], dim=1), strict=True):
                bridged.get_submodule(name).weight += piece
            logits = without(bridged, block, dense.table.layers)(held_out, use_cache=False).logits.log_softmax(-1)
            loss = float((dense_logits.exp() * (dense_logits - logits)).sum(-1).mean())
            assert loss > 1e-5
            assert found[block] == pytest.approx(loss, rel=2e-3)


@pytest.mark.parametrize("case", NORMED_WRITERS)
def test_a_writer_before_a_norm_is_refitted_for_the_norm(case: str, dense_folder: Folders, tmp_path: Path) -> None:
    folder = dense_folder(case)
    dense, model = DenseModel(open_source(str(folder))), load(folder, dtype=torch.float64)
    fit, held_out = tiny.random_ids(12, 24, seed=1), tiny.random_ids(4, 24, seed=2)
    batches = [Batch(fit), Batch(held_out, group=HELD_OUT_GROUP)]
    found = missed_least(run_of(dense, [], tmp_path), 9, batches)
    layers = dense.table.layers
    with torch.no_grad():
        dense_logits = model(held_out).logits.log_softmax(-1)
        for block in range(1, dense.anatomy.block_count):
            writer, norm = (f"{layers}.{block - 1}.{name}" for name in NORMED_WRITERS[case])
            gain = model.get_submodule(norm).weight
            last = block + 1 == dense.anatomy.block_count
            streams = [f"{layers}.{block}", dense.table.final_norm if last else f"{layers}.{block + 1}"]
            with captured_inputs(model, [writer, norm, *streams]) as seen:
                model(fit)
            a, u, x, behind = (seen[name].flatten(0, -2) for name in (writer, norm, *streams))
            size, both = ((t.square().mean(-1, keepdim=True) + EPS).rsqrt() for t in (behind, u))
            # The norm divides by the size of u: the least of |g y - error|^2 + DAMPING mean(g^2) |y|^2 by y
            repair = gain * (behind - x) / (gain.square() + DAMPING * gain.square().mean())
            inputs, outputs = size * both * a, size * gain.abs() * repair
            level = DEFAULT_RIDGE * inputs.square().sum() / a.shape[1]
            moment = inputs.T @ inputs + level * torch.eye(a.shape[1])
            change = torch.linalg.solve(moment, inputs.T @ outputs).T / gain.abs()[:, None]
            bridged = load(folder, dtype=torch.float64)
            bridged.get_submodule(writer).weight += change
            logits = without(bridged, block, layers)(held_out, use_cache=False).logits.log_softmax(-1)
            loss = float((dense_logits.exp() * (dense_logits - logits)).sum(-1).mean())
            plain = without(load(folder, dtype=torch.float64), block, layers)(held_out, use_cache=False).logits
            assert loss > 1e-5
            assert found[block] == pytest.approx(loss, rel=2e-3)
            assert float((dense_logits.exp() * (dense_logits - plain.log_softmax(-1))).sum(-1).mean()) > 1.01 * loss


def test_those_that_part_farthest_from_the_dense_stream_are_not_measured(dense_folder: Folders, tmp_path: Path) -> None:
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    batches = [Batch(tiny.random_ids(12, 24, seed=1)), Batch(tiny.random_ids(4, 24, seed=2), group=HELD_OUT_GROUP)]
    every, one = (missed_least(run_of(dense, [], tmp_path), count, batches) for count in (9, 1))
    assert set(every) == {1, 2}
    assert one.items() < every.items()


@pytest.mark.parametrize("dropped", [[0], [3], [1, 1], [1.5], [1, 2, 3]])
def test_no_such_blocks(dropped: list[Any], run_slice: Slicer, recipe: Recipe) -> None:
    with pytest.raises(OptionsError, match=r"blocks|neurons") as error:
        run_slice("llama", recipe=recipe(dropped_blocks=dropped))
    check_message(error.value)


def test_keep_tries_to_leave_out_blocks_unless_told_not_to(run_slice: Slicer) -> None:
    tried, whole = (run_slice("llama", keep=0.3, depth=depth).manifest["trials"] for depth in (True, False))
    dropped = [trial.get("dropped_blocks") for trial in tried]
    assert [1] in dropped or [2] in dropped
    assert {trial.get("dropped_blocks") and 1 for trial in whole} == {None}
    assert all(isinstance(trial["kl"], float) for trial in tried)
