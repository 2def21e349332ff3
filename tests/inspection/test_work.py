"""The counted work of slicing is what a run multiplies."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eigenslice.checkpoint.source import open_source
from eigenslice.inspection import work as module
from eigenslice.inspection.work import KEPT, Work, work_by_stage
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import slice_model
from tests import tiny
from tests.conftest import Folders

SEQUENCES, LENGTH = 48, 32
STAGES = {"head": ("head", "predicting")}
"""Stages of a run that are counted together; others are counted by their own names."""


class Operations(TorchDispatchMode):
    """Counts the operations of products, by the stage of the run that tells its progress."""

    def __init__(self) -> None:
        super().__init__()
        self.by_stage: dict[str, int] = {}
        self._stage = ""

    def progress(self, stage: str, done: int, total: int, tokens: int | None = None) -> None:
        self._stage = stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        count = flop_registry.get(func._overloadpacket)
        if count:
            known = self.by_stage.get(self._stage, 0)
            self.by_stage[self._stage] = known + count(*args, **kwargs or {}, out_val=result)
        return result


def operations(anatomy: Anatomy, work: Work) -> float:
    """Operations of work; a product takes two for each number of its matrix."""
    width, neurons = anatomy.width, anatomy.neuron_count
    heads = anatomy.config.num_attention_heads
    attention = 4 * LENGTH * heads * getattr(anatomy.config, "head_dim", width // heads)
    block = 2 * sum(anatomy.block_sizes) / anatomy.block_count + attention
    squares = 2 * width**2 * (work.squares + work.narrow)
    vocabulary = anatomy.shapes[anatomy.table.embeddings[0] + ".weight"][0]
    products = 2 * width * (neurons * work.neurons + vocabulary * work.head)
    return block * work.blocks + squares + 2 * neurons**2 * work.broad + products


@pytest.mark.parametrize("case", ["llama", "starcoder2"])
def test_counted_operations_are_those_of_a_run(
    case: str, dense_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a quarter in all, and to a factor of two in each stage: the plan that wins is known only behind the trials."""
    monkeypatch.setattr(module, "RANDOM_SHARE", 0.0)
    folder, ids = dense_folder(case), tmp_path / "ids.safetensors"
    save_file({"calibration": tiny.structured_ids(SEQUENCES, LENGTH, seed=3)}, ids)
    options = SliceOptions(
        model=str(folder),
        output=tmp_path / "out",
        keep=KEPT,
        calibration=CalibrationOptions(data=str(ids)),
        own_text=0.0,
        random_tokens=0.0,
        device="cpu",
    )
    counter = Operations()
    with counter:
        slice_model(options, counter.progress)
    anatomy = DenseModel(open_source(str(folder))).anatomy
    work = work_by_stage(anatomy, SEQUENCES * LENGTH, writes=False)
    expected = {stage: operations(anatomy, one) for stage, one in work.items()}
    found = {stage: sum(counter.by_stage.get(part, 0) for part in STAGES.get(stage, (stage,))) for stage in expected}
    assert sum(expected.values()) == pytest.approx(sum(found.values()), rel=0.25)
    for stage, count in found.items():
        assert count / 2 <= expected[stage] <= 2 * count, stage
    assert sum(found.values()) > 0.98 * sum(counter.by_stage.values())
