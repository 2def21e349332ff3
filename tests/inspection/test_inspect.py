"""What inspect promises is what slicing stores."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eigenslice.inspection.inspect import inspect_model
from tests import tiny
from tests.conftest import Slicer
from tests.results import load


@pytest.mark.parametrize("case", ["llama-tied", "qwen2", "opt", "phi", "gpt_neox"])
def test_sizes_are_those_of_the_results(case: str, run_slice: Slicer, dense_folder: Callable[[str], Path]) -> None:
    inspection = inspect_model(str(dense_folder(case)))
    assert inspection.parameters == load(dense_folder(case)).num_parameters()
    assert inspection.parameters == sum(inspection.by_role.values())
    dense = load(dense_folder(case))
    ends = {id(p): p for end in (dense.get_input_embeddings(), dense.get_output_embeddings()) for p in end.parameters()}
    assert inspection.tokens == tiny.VOCABULARY
    assert inspection.vocabulary_share == sum(p.numel() for p in ends.values()) / dense.num_parameters()
    for row in inspection.sizes:
        if row.slicing in (0.0, 0.25):
            manifest = run_slice(case, width=row.width, basis=row.basis).manifest
            assert manifest["parameters"]["stored"] == row.parameters
            assert manifest["model_type"] == row.saved_as
            assert manifest["tied"] == row.tied
