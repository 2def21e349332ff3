"""Estimates grow as the work does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eigenslice.checkpoint.source import open_source
from eigenslice.inspection import probe as probing
from eigenslice.inspection.estimate import estimate
from eigenslice.inspection.healing_need import healing_memory
from eigenslice.inspection.memory_need import Memory, MemoryNeed, memory_need
from eigenslice.inspection.probe import PROBE_TOKENS, Probe
from eigenslice.inspection.work import Work
from eigenslice.model.dense import DenseModel
from eigenslice.runtime.offload import Place
from eigenslice.slicing.memory import WRITING, activation_bytes, gathered_numbers, shared_training_bytes, training_bytes
from tests.conftest import Folders
from tests.fake_device import fake_device


def test_more_tokens_take_longer_and_refitting_more_still(
    dense_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "faster_of_two", lambda work, device: 1.0)  # a busy machine tells nothing
    for case in ("llama", "opt", "gpt_neox"):
        dense = DenseModel(open_source(str(dense_folder(case))))
        few, many = (estimate(dense, tokens, 16) for tokens in (1_000, 1_000_000))
        assert 0 < few.seconds < many.seconds / 10
        assert few.seconds < few.refitted_seconds
        assert few.memory.host < few.refitted_memory.host
        assert few.memory.device == few.refitted_memory.device == 0
        grown = activation_bytes(dense.anatomy, 999_000, torch.float32) // 2
        assert many.memory.host - few.memory.host == pytest.approx(grown, rel=0.05)


def test_seconds_are_times_of_parts() -> None:
    """Seconds of tokens are those of the probe's two tokens; a regression is one of its own."""
    probe = Probe(2, *(float(10**power) for power in range(7)), narrow_fit=0.5, broad_fit=0.25)
    each = {
        "blocks": 1.0,
        "written": WRITING,
        "narrow": 10.0,
        "broad": 100.0,
        "squares": 1e3,
        "neurons": 1e4,
        "head": 1e5,
    }
    for name, seconds in each.items():
        assert probe.seconds(Work(**{name: 6.0})) == pytest.approx(3 * seconds), name
    assert probe.seconds(Work(narrow_fits=2, broad_fits=8)) == 3.0


def test_the_stages_are_the_whole_time(dense_folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "faster_of_two", lambda work, device: 1.0)
    guess = estimate(DenseModel(open_source(str(dense_folder("llama")))), 1_000, 16)
    assert list(guess.stage_seconds) == ["sampling", "measuring", "depth", "allocating", "planning", "slicing", "head"]
    writing = 3 * 3  # each of three blocks is folded three times
    assert guess.refitted_seconds == pytest.approx(sum(guess.stage_seconds.values()) + writing)


@pytest.mark.parametrize(("features", "operands"), [({}, "highest"), ({"avx512_bf16": True}, "medium")])
def test_products_are_timed_as_the_run_makes_them(
    features: dict[str, bool], operands: str, dense_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def seconds(work: object, device: torch.device) -> float:
        seen.append(torch.get_float32_matmul_precision())
        return 1.0

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(probing, "faster_of_two", seconds)
    estimate(DenseModel(open_source(str(dense_folder("llama")))), 1_000, 16)
    assert set(seen) == {operands}


def test_a_gpu_s_memory_and_bus_are_apart(dense_folder: Folders) -> None:
    with fake_device() as gpu:
        dense = DenseModel(open_source(str(dense_folder("llama"))), gpu.device)
        guess = estimate(dense, 100_000, 16)
        assert guess.bus_seconds > 0
        assert not guess.advice
        need = memory_need(dense, 100_000, torch.float32)
        assert need.place == "device"
        assert need.refitted.device > activation_bytes(dense.anatomy, 100_000, torch.float32)
        gpu.total = need.activations  # activations then live on the host
        moved = memory_need(dense, 100_000, torch.float32)
        assert moved.place == "host"
        assert moved.refitted.host - need.refitted.host == pytest.approx(need.activations, rel=0.2)
        assert moved.refitted.device < need.refitted.device - need.activations // 2


@pytest.mark.parametrize(
    ("place", "device", "host", "expected"),
    [
        ("device", 0, 10**15, "--offload disk"),
        ("disk", 0, 10**15, "--no-refit fits"),
        ("device", 10**15, 0, "device memory"),
    ],
)
def test_what_does_not_fit_names_the_option(place: Place, device: int, host: int, expected: str) -> None:
    need = MemoryNeed(Memory(0, 0), Memory(host, device), place, host if place != "disk" else 0)
    with fake_device() as gpu:
        (line,) = need.advice(gpu.device if device else torch.device("cpu"))
    assert expected in line
    assert not MemoryNeed(Memory(0, 0), Memory(0, 0), place, 0).advice(torch.device("cpu"))


def test_activations_are_two_streams_and_what_writers_read(dense_folder: Folders) -> None:
    """Width 32 and 64 neurons: 128 numbers of 4 bytes a token."""
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    assert activation_bytes(dense.anatomy, 10, torch.float32) == 10 * 4 * (
        2 * dense.anatomy.width + dense.anatomy.neuron_count
    )
    assert activation_bytes(dense.anatomy, 10, torch.bfloat16) == 10 * 2 * (
        2 * dense.anatomy.width + dense.anatomy.neuron_count
    )


@pytest.mark.parametrize(("case", "kinds"), [("llama", 2), ("phi3", 2), ("opt", 1), ("gpt2", 1)])
def test_fitting_readers_keeps_slopes_and_what_they_read(case: str, kinds: int, dense_folder: Folders) -> None:
    dense = DenseModel(open_source(str(dense_folder(case))))
    for tokens, some in ((40, 40), (100_000, 25_000)):  # the curvature is that of some of many tokens
        sizes = [
            activation_bytes(dense.anatomy, tokens, torch.float32, refitted=refitted) for refitted in (True, False)
        ]
        assert sizes[0] - sizes[1] == some * 4 * (dense.anatomy.width + kinds * dense.anatomy.neuron_count)


@pytest.mark.parametrize(("case", "shared"), [("mixtral", 0), ("deepseek_v3", 2 * 24)])
def test_fitting_experts_keeps_their_ends(case: str, shared: int, dense_folder: Folders) -> None:
    """Input, output, and what is missing, 32 numbers each; and the neurons of shared experts."""
    anatomy = DenseModel(open_source(str(dense_folder(case)))).anatomy
    sizes = [activation_bytes(anatomy, 10, torch.float32, refitted=refitted) for refitted in (True, False)]
    assert sizes == [10 * 4 * (5 * 32 + shared), 10 * 4 * 3 * 32]


def test_results_in_the_custom_class_take_a_pass_more(dense_folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "faster_of_two", lambda work, device: 1.0)
    stock, custom = (
        estimate(DenseModel(open_source(str(dense_folder(case)))), 1_000, 16).refitted_seconds
        for case in ("llama", "bloom")
    )
    assert custom > 1.1 * stock


def test_healing_takes_four_passes_and_the_text(dense_folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part takes a second: 64 windows of 16 tokens pass 3 blocks and the head (vocabulary 96, timed whole)."""
    monkeypatch.setattr(probing, "faster_of_two", lambda work, device: 1.0)
    dense = DenseModel(open_source(str(dense_folder("llama"))))
    guess, blocks = estimate(dense, 1_000, 16), dense.anatomy.block_count
    written = WRITING / 3 * blocks  # a third of the tokens
    assert guess.healing_seconds == pytest.approx(100_000 / PROBE_TOKENS * (4 * (blocks + 1) + written))
    assert guess.healing_memory.whole > 16 * dense.anatomy.parameters


def test_bytes_of_a_training() -> None:
    """A Llama of 7 B with a teacher in bfloat16 takes 16 bytes a weight, 2 for the teacher, and its logits."""
    assert training_bytes(7 * 10**9, 14 * 10**9, 512, 32_000) == 126 * 10**9 + 512 * 32_000 * 12


def test_bytes_of_a_shared_training() -> None:
    """Of 126 GB, each of 8 processes holds an eighth, beside its own logits and what it gathers."""
    assert shared_training_bytes(126, 3, 5, 1) == 129
    assert shared_training_bytes(126, 3, 5, 2) == 63 + 3 + 5
    assert gathered_numbers(200, 1000) == 5 * 200 + 3 * 1000


def test_a_large_model_is_healed_on_several_devices_or_from_the_host() -> None:
    """A Llama 3 8B's sizes: 145 GB on one device, and less than 50 on each of 4; with adapters a GPU of 24 GB."""
    sizes = {"parameters": 8_030_000_000, "tokens": 128_256, "block_sizes": [218_000_000] * 32}
    outside = {"model.embed_tokens.weight": 128_256 * 4096, "lm_head.weight": 128_256 * 4096}
    anatomy: Any = SimpleNamespace(**sizes, vocabulary_parameters=outside)
    memory = healing_memory(anatomy, 2 * 8_030_000_000, torch.bfloat16)
    assert memory.whole == pytest.approx(146e9, rel=0.01)
    assert memory.shared == pytest.approx({2: 82e9, 4: 46e9, 8: 28e9}, rel=0.02)
    assert memory.adapters == pytest.approx(33e9, rel=0.03)
    assert memory.on_host.host == pytest.approx(33e9, rel=0.03)
    assert memory.on_host.device == pytest.approx(0.8e9 + 2 * (5 * 218e6 + 3 * 1.05e9), rel=0.01)
