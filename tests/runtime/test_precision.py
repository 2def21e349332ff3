"""The precision of each kind of arithmetic: chosen by the device, kept to, and good enough."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eigenslice.algebra.covariance import SecondMoment
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime.precision import (
    EXACT,
    ON_BF16_CPU,
    ON_TENSOR_CORES,
    Precision,
    choose_precision,
    products,
)
from eigenslice.slicing import slice_model
from tests.conftest import Folders
from tests.fake_device import fake_device
from tests.results import relative
from tests.tensor_cores import TensorCores

CPU = torch.device("cpu")
CHOICES = {
    "tensor cores": ON_TENSOR_CORES,
    "bfloat16 on a CPU": ON_BF16_CPU,
    "bfloat16 Gram matrices": Precision(gram="bfloat16", neurons="bfloat16"),
    "float32 solves": Precision(solve="float32"),
}


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16": True}, ON_BF16_CPU), ({"amx_bf16": True, "avx2": True}, ON_BF16_CPU), ({"avx2": True}, EXACT)],
)
def test_a_cpu_multiplies_bfloat16_where_it_has_instructions_for_it(
    features: dict[str, bool], expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert choose_precision(CPU) == expected
    assert choose_precision(CPU, "float32") == EXACT


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), ON_TENSOR_CORES), ((7, 5), Precision(solve="float32"))])
def test_a_gpu_uses_tf32_where_it_has_it(
    capability: tuple[int, int], expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(torch.device("cuda")) == expected


def test_the_setting_before_comes_back_after_an_error() -> None:
    with products("tf32"):
        with products("bfloat16"):
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ZeroDivisionError), products("bfloat16"):
            _ = 1 / 0
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("operands", "worst"), [("float32", 1e-6), ("tf32", 1e-4), ("bfloat16", 1e-3)])
def test_a_sum_over_a_million_tokens_is_honest(operands: Any, worst: float) -> None:
    """As a share of the largest entry. Added one by one in float32, a million ones and a bit are off by percents."""
    rows = 1 + 0.01 * torch.randn(2**20, 2, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(2)
    with TensorCores(), products(operands):
        moment.add(rows)
    exact = rows.double().T @ rows.double()
    assert float((moment.matrix - exact).abs().max() / exact.max()) < worst


@pytest.fixture(scope="module")
def sliced(dense_folder: Folders, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Slices with a precision; gives the manifest, the tensors, and what the hardware has seen."""
    folder = tmp_path_factory.mktemp("precision")

    def run(
        name: str, precision: Precision, case: str = "llama"
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor], TensorCores]:
        data = CalibrationOptions(data=str(calibration))
        options = SliceOptions(
            model=str(dense_folder(case)), output=folder / f"{case}-{name}", calibration=data, width=24, neurons=40
        )
        with TensorCores() as cores:
            result = slice_model(options, precision=precision)
        return result.manifest, load_file(result.output / "model.safetensors"), cores

    return run


@pytest.fixture(scope="module")
def exact(sliced: Any) -> Any:
    return sliced("exact", EXACT)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_gives_what_float64_gives(name: str, sliced: Any, exact: Any) -> None:
    manifest, _, cores = sliced(name, CHOICES[name])
    choice = CHOICES[name]
    assert manifest["precision"] == choice.describe()
    names = {"float32": "highest", "tf32": "high", "bfloat16": "medium"}
    assert cores.used == {names[kind] for kind in (choice.forward, choice.gram, choice.neurons)}
    assert torch.float32 in cores.solved
    assert (torch.float64 in cores.solved) == (choice.solve == "float64")
    assert manifest["loss"]["kl"] == pytest.approx(exact[0]["loss"]["kl"], rel=0.01)


@pytest.mark.parametrize("case", ["mixtral", "gemma2"])
def test_float32_solves_of_experts_and_normed_writers(case: str, sliced: Any) -> None:
    exact, single = (sliced(p.solve, p, case)[0]["loss"]["kl"] for p in (EXACT, Precision(solve="float32")))
    assert single == pytest.approx(exact, rel=0.01)


def test_float32_solves_change_less_than_storage(sliced: Any, exact: Any) -> None:
    """bfloat16 rounds weights by 2^-9 of themselves."""
    _, tensors, _ = sliced("solves", Precision(solve="float32"))
    assert all(relative(tensors[name], tensor) < 2**-9 for name, tensor in exact[1].items())


def test_the_manifest_says_what_a_gpu_used(dense_folder: Folders, calibration: Path, tmp_path: Path) -> None:
    data = CalibrationOptions(data=str(calibration))
    with fake_device():
        options = SliceOptions(
            model=str(dense_folder("llama")),
            output=tmp_path / "out",
            calibration=data,
            width=24,
            device="cuda",
            compute_dtype="bfloat16",
        )
        precision = slice_model(options).manifest["precision"]
    assert precision == ON_TENSOR_CORES.describe() | {"forward": "bfloat16"}
