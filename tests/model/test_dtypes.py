"""The stored dtype: of the model, not of its embedding; mixed ones are said."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from eigenslice.checkpoint.source import open_source
from eigenslice.errors import EigensliceWarning
from eigenslice.inspection.inspect import inspect_model
from eigenslice.model.dense import DenseModel
from eigenslice.model.dtypes import prevailing
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import slice_model
from tests import tiny
from tests.checkpoint.files import copy_of, edit_json, rewrite

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("numbers", "blocks", "config", "expected"),
    [
        ({BF16: 100}, {BF16: 60}, F32, BF16),  # nothing is stored as the config says
        ({F32: 63, BF16: 37}, {BF16: 37}, BF16, BF16),  # a large embedding in float32
        ({BF16: 63, F32: 37}, {F32: 37}, F32, F32),  # one in bfloat16 doesn't round the rest
        ({F32: 40, BF16: 60}, {BF16: 60}, F32, BF16),
        ({F32: 50, BF16: 50}, {F32: 25, BF16: 25}, BF16, BF16),
        ({F32: 50, BF16: 50}, {F32: 25, BF16: 25}, "bfloat16", BF16),
        ({F32: 90, BF16: 10}, {F32: 50, BF16: 10}, BF16, F32),
        ({F32: 90, BF16: 10}, {F32: 50, BF16: 10}, None, F32),
        ({F32: 60, BF16: 40}, {BF16: 40}, F16, F32),
    ],
)
def test_two_of_three_decide(numbers: dict, blocks: dict, config: object, expected: torch.dtype) -> None:
    assert prevailing(Counter(numbers), Counter(blocks), SimpleNamespace(dtype=config)) is expected


def mixed(folder: Path, target: Path, most: torch.dtype, embedding: torch.dtype, config: str) -> Path:
    """A copy with all tensors in one dtype and the embedding in another."""
    copy = copy_of(folder, target)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(embedding if name == EMBEDDING else most)

    edit_json(copy / "config.json", dtype=config)
    return rewrite(copy, change)


def stored(folder: Path) -> set[torch.dtype]:
    dtypes = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            dtypes |= {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    return dtypes


@pytest.mark.parametrize("config", ["bfloat16", "float32"])
@pytest.mark.parametrize(("most", "embedding"), [(BF16, F32), (F32, BF16)])
def test_a_result_is_stored_as_most_of_the_model(
    most: torch.dtype,
    embedding: torch.dtype,
    config: str,
    dense_folder: Callable[[str], Path],
    calibration: Path,
    tmp_path: Path,
) -> None:
    folder = mixed(dense_folder("llama"), tmp_path / "model", most, embedding, config)
    options = SliceOptions(
        model=str(folder), output=tmp_path / "out", keep=0.9, calibration=CalibrationOptions(data=str(calibration))
    )
    with pytest.warns(EigensliceWarning, match=r"numbers in (bfloat16|float32), [\d,]+ numbers in"):
        result = slice_model(options)
    assert stored(tmp_path / "out") == {most}
    assert result.manifest["dtype"] == str(most).removeprefix("torch.")
    sizes = [sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (folder, tmp_path / "out")]
    assert sizes[1] < sizes[0]


def test_inspect_says_the_dtype_of_most_and_that_there_are_others(
    dense_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = mixed(dense_folder("llama"), tmp_path / "model", BF16, F32, "bfloat16")
    numbers = tiny.VOCABULARY * tiny.WIDTH
    with pytest.warns(EigensliceWarning, match=f"{numbers:,} numbers in float32"):
        assert inspect_model(str(folder)).dtype == "bfloat16"


def test_tensors_that_transformers_keeps_in_float32_are_no_mixture(
    dense_folder: Callable[[str], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = copy_of(dense_folder("deepseek_v3"), tmp_path / "model")
    kept = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                kept.append(name)
            else:
                tensors[name] = tensors[name].bfloat16()

    assert DenseModel(open_source(str(rewrite(folder, change)))).dtype is BF16
    assert kept
    assert not [warning for warning in recwarn if issubclass(warning.category, EigensliceWarning)]
