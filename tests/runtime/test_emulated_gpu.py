"""On an emulated GPU, which refuses tensors of two places, everything gives what it gives on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.checkpoint.loading import load_model
from eigenslice.data.own_text import sample_text
from eigenslice.evaluation.perplexity import evaluate
from eigenslice.evaluation.speed import bench
from eigenslice.options.benchmark import BenchOptions
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.sampling import SampleOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.precision import EXACT
from eigenslice.slicing import slice as slicing
from eigenslice.slicing import slice_model
from eigenslice.stream.run import Run
from tests import tiny, words
from tests.checkpoint.files import copy_of
from tests.checkpoint.gguf_file import write_gguf
from tests.conftest import Folders, Slicer
from tests.fake_device import DeviceTensor, fake_device
from tests.results import load

SLICES: dict[str, tuple[str, dict[str, Any]]] = {
    "global basis": ("llama", {"width": 24, "neurons": 40}),
    "nothing fitted": ("llama-tied", {"width": 24, "refit": False}),
    "planned, custom class": ("llama", {"keep": 0.7, "form": "custom"}),
    "per-block basis, LayerNorm": ("opt", {"width": 24, "basis": "per-block"}),
    "LayerNorm, stock": ("phi", {"width": 24, "neurons": 40}),
    "mixture": ("mixtral", {"width": 24, "neurons": 16}),
    "norms after sublayers": ("gemma2", {"width": 24}),
    "files as memory": ("llama", {"width": 24, "offload": "disk"}),
}

MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "addition": lambda here, there: here + there,
    "addition in place": lambda here, there: there.add_(here),
    "a number of the device": lambda here, there: there * here[0, 0],
    "product": lambda here, there: torch.nn.functional.linear(there, here),
    "joined": lambda here, there: torch.cat([here, there]),
    "stacked numbers": lambda here, there: torch.stack([here[0, 0], there[0, 0]]),
    "looked up": lambda here, there: here.index_select(0, there[0].long()),
    "indexed": lambda here, there: there[here[0].long()],
    "put": lambda here, there: here.__setitem__(there[0].long(), there),
    "a generator": lambda here, there: torch.rand(2, device=here.device, generator=torch.Generator()),
    "numpy": lambda here, there: here.numpy(),
}
ALLOWED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a number of the CPU": lambda here, there: here * there[0, 0],
    "indices of the CPU": lambda here, there: here[there[0].long()],
    "copied": lambda here, there: here.copy_(there),
    "a part copied": lambda here, there: here.__setitem__(0, there[0]),
}


@pytest.fixture
def speaking(dense_folder: Folders, tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """400 words."""
    file = tmp_path / "words.txt"
    file.write_text(words.text(tiny.random_ids(1, 400)[0].tolist()))
    return file


@pytest.mark.parametrize("kind", MIXED)
def test_two_places_are_refused(kind: str) -> None:
    with fake_device() as gpu:
        here, there = torch.zeros(3, 3, device=gpu.device), torch.zeros(3, 3)
        MIXED[kind](there.clone(), there.clone()) if kind != "a generator" else None
        with pytest.raises((RuntimeError, TypeError), match=r"device|CPU"):
            MIXED[kind](here, there)


@pytest.mark.parametrize("kind", ALLOWED)
def test_single_numbers_indices_and_copies_are_not(kind: str) -> None:
    with fake_device() as gpu:
        ALLOWED[kind](torch.zeros(3, 3, device=gpu.device), torch.zeros(3, 3))


def test_places_and_bytes() -> None:
    with fake_device() as gpu:
        there = torch.ones(5, dtype=torch.bfloat16)
        here = there.to("cuda", torch.float64)  # converted on the host, so that eight bytes each cross
        assert (gpu.to_device, gpu.to_host) == (40, 0)
        assert gpu.allocated == 40
        assert here.device == gpu.device
        assert isinstance(here.sum() + 1, DeviceTensor)
        assert here.to(torch.float32).cpu().device == torch.device("cpu")
        assert (gpu.to_device, gpu.to_host) == (40, 20)
        module = torch.nn.Linear(2, 2).to("cuda")
        assert module(torch.ones(1, 2, device="cuda")).device == gpu.device
        del here, module
        assert gpu.allocated == 0


@pytest.mark.parametrize("kind", SLICES)
def test_slices_are_those_of_the_cpu(kind: str, run_slice: Slicer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "choose_precision", lambda device, compute: EXACT)  # as on the CPU
    case, options = SLICES[kind]
    expected = run_slice(case, **options)
    with fake_device() as gpu:
        found = run_slice(case, **options, device="cuda")
        assert gpu.to_device > 0
    check_same(found.output, expected.output)


def test_own_text_is_that_of_the_cpu(speaking: Path, text: Path, run_slice: Slicer) -> None:
    data = CalibrationOptions(data=str(text), samples=12, seqlen=30)
    options = {"model": str(speaking), "calibration": data, "width": 24, "own_text": 0.5}
    expected = run_slice("llama", **options)
    with fake_device():
        found = run_slice("llama", **options, device="cuda")
    assert found.manifest["calibration"]["own_sequences"] == 6
    assert found.manifest["calibration"] == expected.manifest["calibration"]
    check_same(found.output, expected.output)


def test_a_model_writes_and_predicts_as_on_the_cpu(speaking: Path, text: Path, tmp_path: Path) -> None:
    options = SampleOptions(model=str(speaking), output=tmp_path / "texts.json", samples=3, seqlen=8, device="cpu")
    data = CalibrationOptions(data=str(text), samples=4, seqlen=20)
    texts, perplexity = sample_text(options), evaluate(str(speaking), data, "cpu")
    with fake_device():
        assert sample_text(options.model_copy(update={"output": tmp_path / "again.json", "device": "cuda"})) == texts
        assert evaluate(str(speaking), data, "cuda") == perplexity


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_models_are_timed_and_gone_before_memory_is_measured(static: bool, speaking: Path) -> None:
    options = BenchOptions(prompt=8, new=3, runs=3, static_cache=static, device="cuda")
    held: list[int] = []  # while the models are timed

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "timing":
            held.append(gpu.allocated)

    with fake_device() as gpu:
        rows = bench([str(speaking), str(speaking)], options, watch)["models"]
        assert gpu.at_resets == [0, 0]
    assert all(row["peak_bytes"] > 4 * row["parameters"] for row in rows)
    assert held[-1] < 1.1 * held[0]  # the times of four rounds are kept, not their caches


def test_a_gguf_runs_in_bfloat16(speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are dequantized to float32, which takes twice the memory and, on a GPU, much more time."""
    path, used = write_gguf(load(speaking), tmp_path / "model.gguf"), list[torch.dtype]()
    monkeypatch.setattr(Run, "walk", spy(used))
    data = CalibrationOptions(data=str(tiny.calibration_file(tmp_path)))
    given: dict[str, Any] = {"model": str(path), "width": 24, "calibration": data, "device": "cuda"}
    for number, options in enumerate([{}, {"compute_dtype": "float32"}, {"device": "cpu"}]):
        run: dict[str, Any] = given | {"output": tmp_path / str(number)} | options
        with fake_device():
            slice_model(SliceOptions(**run))
    assert list(dict.fromkeys(used[:2])) == [torch.bfloat16]
    assert set(used[2:]) == {torch.float32}
    with fake_device():
        assert load_model(str(path), "cuda").model.dtype == torch.bfloat16
    assert load_model(str(path), "cpu").model.dtype == torch.float32


def spy(used: list[torch.dtype]) -> Callable[..., Any]:
    """`Run.walk` that keeps the dtype of each pass."""
    walk = Run.walk

    def watched(run: Run, *args: Any, **options: Any) -> Any:
        used.append(run.dtype)
        return walk(run, *args, **options)

    return watched


def check_same(found: Path, expected: Path) -> None:
    """Both results have the same weights."""
    tensors, others = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-6)
