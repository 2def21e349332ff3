"""What is trained, and whether its weights are shared, by the memory that is free."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eigenslice.errors import OptionsError
from eigenslice.finetune import FinetuneOptions, trained_weights
from eigenslice.finetune.trained_weights import Needs, Way, with_weights_chosen
from eigenslice.runtime.ranks import ALONE, Ranks
from tests.messages import check_message

NEEDS = Needs(all_weights=1000, adapters=400, passing=10, gathered=20)
FREE = {
    "all weights, whole": (1270, (True, "device")),
    "all weights, shared": (1250, (True, "shared")),
    "adapters, whole": (600, (False, "device")),
    "adapters, shared": (500, (False, "shared")),
    "hardly": (240, (False, "shared")),
}
"""Free bytes of each of two devices, and whether all weights are trained, and shared."""


class Two(Ranks):
    """The first of two processes on GPUs, which waits for nobody."""

    def on_first(self, do: Any) -> Any:
        return do()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Two:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    return Two(0, 2)


def options(**more: Any) -> FinetuneOptions:
    return FinetuneOptions(**{"model": "small", "output": Path("out")} | more)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(trained_weights, "free_bytes", lambda device: count)


@pytest.mark.parametrize("kind", FREE)
def test_what_recovers_most_is_trained_where_it_fits(kind: str, pair: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    count, expected = FREE[kind]
    free(monkeypatch, count)
    chosen = with_weights_chosen(options(), NEEDS, pair)
    assert (chosen.full, chosen.place) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"full": False}, (False, "device")),
        ({"keep_adapter": True}, (False, "device")),
        ({"place": "shared"}, (True, "shared")),
        ({"full": False, "place": "shared"}, (False, "shared")),
        ({"full": True, "place": "device"}, (True, "device")),
    ],
    ids=str,
)
def test_what_was_asked_for_is_done(
    given: dict[str, Any], expected: Way, pair: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 10**6)
    chosen = with_weights_chosen(options(**given), NEEDS, pair)
    assert (chosen.full, chosen.place) == expected


def test_processes_of_a_machine_share_its_memory(pair: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    free(monkeypatch, 2 * 600)
    chosen = with_weights_chosen(options(), NEEDS, pair)
    assert (chosen.full, chosen.place) == (False, "device")


def test_what_fits_nowhere_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 200)
    with pytest.raises(OptionsError, match="training adapters of small takes") as caught:
        with_weights_chosen(options(), NEEDS, ALONE)
    check_message(caught.value)
    assert "torchrun --nproc-per-node 4 -m eigenslice finetune" in caught.value.next_step
    with pytest.raises(OptionsError, match="training all weights of small takes") as caught:
        with_weights_chosen(options(full=True), NEEDS, ALONE)
    assert "--nproc-per-node 8" in caught.value.next_step
    assert "leave --full out" in caught.value.next_step
    free(monkeypatch, 25)
    with pytest.raises(OptionsError, match="free") as caught:
        with_weights_chosen(options(), NEEDS, ALONE)
    assert "a device with more memory" not in caught.value.next_step
    assert "lower --seqlen or --micro-batch" in caught.value.next_step


ON_GPU = {
    "all weights": (1270, 10**6, {}, (True, "device")),
    "adapters": (600, 10**6, {}, (False, "device")),
    "adapters from the host": (50, 600, {}, (False, "host")),
    "not all weights from the host": (50, 10**6, {}, (False, "host")),
    "all weights from the host": (50, 1250, {"full": True}, (True, "host")),
    "asked for, all weights": (10**6, 1250, {"place": "host"}, (True, "host")),
    "asked for, adapters": (10**6, 1240, {"place": "host"}, (False, "host")),
}
"""Free bytes of a GPU and of the host, options, and what one process trains."""


@pytest.mark.parametrize("kind", ON_GPU)
def test_weights_lie_on_the_host_where_a_gpu_is_too_small(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, host, given, expected = ON_GPU[kind]
    monkeypatch.setattr(trained_weights, "free_bytes", lambda place: device if place.type == "cuda" else host)
    chosen = with_weights_chosen(options(**given), NEEDS, Ranks(device=torch.device("cuda")))
    assert (chosen.full, chosen.place) == expected


def test_what_fits_neither_a_gpu_nor_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_weights, "free_bytes", lambda place: 50 if place.type == "cuda" else 300)
    with pytest.raises(OptionsError, match="GiB on the host, where") as caught:
        with_weights_chosen(options(), NEEDS, Ranks(device=torch.device("cuda")))
    check_message(caught.value)


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(OptionsError, match="--place shared in one process") as caught:
        with_weights_chosen(options(place="shared"), NEEDS, ALONE)
    check_message(caught.value)


def test_needs_of_a_model_on_a_gpu() -> None:
    """A Llama of 8 B with its teacher: bytes in bfloat16, gathered weights of five blocks and three vocabularies."""
    text = SimpleNamespace(vocab_size=128_256, hidden_size=4096, num_hidden_layers=32)
    config = SimpleNamespace(get_text_config=lambda: text)
    needs = Needs.of(options(micro_batch=2), 7 * 10**9, 8 * 10**9, config, 2)
    assert needs.all_weights == 16 * 7 * 10**9 + 2 * 8 * 10**9
    assert needs.adapters == 2 * 15 * 10**9
    assert needs.passing == 12 * 2 * 1024 * 128_256
    assert needs.gathered == 2 * (5 * 250_000_000 + 3 * 2 * 128_256 * 4096)
    assert needs.on_device(False, "shared", 4) == needs.adapters // 4 + needs.passing + needs.gathered
