"""Memory that runs out: the error says where and what to change, and the run goes on from its state."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eigenslice.errors import MemoryRanOutError, OptionsError
from eigenslice.evaluation.perplexity import evaluate
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime import run_state
from eigenslice.runtime.out_of_memory import is_out_of_memory, memory_errors
from eigenslice.runtime.output import partial_path
from eigenslice.slicing import slice_model
from tests.conftest import Folders
from tests.messages import check_message

ON_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB"


def runs_out(stage: str, done: int) -> Callable[..., None]:
    """A progress at which the GPU's memory runs out."""

    def progress(name: str, step: int, total: int, tokens: int = 0) -> None:
        if (name, step) == (stage, done):
            raise torch.OutOfMemoryError(ON_GPU)

    return progress


def test_slicing_says_where_and_goes_on(
    dense_folder: Folders, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "SHARE", 1.0)  # saved after every block
    data = CalibrationOptions(data=str(calibration))
    options = SliceOptions(model=str(dense_folder("llama")), output=tmp_path / "out", calibration=data, width=24)
    with pytest.raises(MemoryRanOutError) as caught:
        slice_model(options, runs_out("slicing", 1))
    partial = partial_path(options.output)
    check_message(caught.value, "in stage slicing, 1 of 3", "2.00 GiB")
    assert all(words in caught.value.next_step for words in ("--offload disk", "--seqlen", f"{partial} keeps"))
    assert partial.exists()
    stages: list[str] = []
    again = options.model_copy(update={"resume": True, "offload": "disk"})
    slice_model(again, lambda stage, done, total, tokens=0: stages.append(stage))
    assert "measuring" not in stages
    assert options.output.exists()


def test_before_anything_is_kept_it_says_so(dense_folder: Folders, calibration: Path, tmp_path: Path) -> None:
    data = CalibrationOptions(data=str(calibration))
    options = SliceOptions(
        model=str(dense_folder("llama")), output=tmp_path / "out", calibration=data, width=24, offload="disk"
    )
    with pytest.raises(MemoryRanOutError) as caught:
        slice_model(options, runs_out("measuring", 0))
    check_message(caught.value, "in stage measuring")
    assert "fewer --samples" in caught.value.next_step
    assert "nothing was written" in caught.value.next_step
    assert "--offload" not in caught.value.next_step
    assert not list(tmp_path.iterdir())


def test_evaluation_says_where(dense_folder: Folders, calibration: Path) -> None:
    data = CalibrationOptions(data=str(calibration))
    with pytest.raises(MemoryRanOutError) as caught:
        evaluate(str(dense_folder("llama")), data, progress=runs_out("evaluating", 0))
    check_message(caught.value, "in stage evaluating")
    assert "--dtype bfloat16" in caught.value.next_step


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(ON_GPU), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes don't match"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OptionsError("out of memory", allowed="x", next_step="y"), False),
    ],
)
def test_only_memory_is_taken_for_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with pytest.raises(MemoryRanOutError if expected else type(error)), memory_errors(print, lambda stage: "less"):
        raise error
