"""The dial sets options that are left out, and no others; a fast run makes one plan and fits what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from eigenslice.fit import reader_step
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.effort import SETTINGS, effort_text
from eigenslice.options.slicing import SliceOptions
from tests.conftest import Slicer

GIVEN: dict[str, Any] = {"model": "m", "output": Path("o"), "keep": 0.8}


def test_the_default_sets_nothing() -> None:
    assert SliceOptions(**GIVEN) == SliceOptions(**GIVEN, effort="default")
    assert SETTINGS["default"] == {}


def test_fast_and_best() -> None:
    fast, best = SliceOptions(**GIVEN, effort="fast"), SliceOptions(**GIVEN, effort="best")
    assert (fast.trials, fast.fit_neurons, fast.own_text, fast.heal) == (False, False, 0.0, None)
    assert (fast.calibration.samples, fast.calibration.seqlen, fast.calibration.data) == (32, 512, ("mixed",))
    assert (best.trials, best.fit_neurons, best.own_text, best.heal) == (True, True, 1.0, 1_000_000)
    assert (best.calibration.samples, best.calibration.seqlen) == (256, 2048)


@pytest.mark.parametrize("text", [CalibrationOptions(samples=128), {"samples": 128}], ids=["model", "dictionary"])
def test_a_given_option_stays(text: Any) -> None:
    """Even where it is the default."""
    options = SliceOptions(**GIVEN, effort="fast", own_text=0.3, trials=True, calibration=text)
    assert (options.own_text, options.trials, options.fit_neurons) == (0.3, True, False)
    assert (options.calibration.samples, options.calibration.seqlen) == (128, 512)
    again = SliceOptions.model_validate_json(options.model_dump_json())
    assert again == options, "a manifest's options mean the same"


def test_flags_in_words() -> None:
    assert effort_text("fast") == "--no-trials --no-fit-neurons --own-text 0 --samples 32 --seqlen 512"
    assert effort_text("best") == "--own-text 1 --heal 1000000 --samples 256"


def test_a_fast_run_tries_no_plan(run_slice: Slicer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cuts neurons alone at the whole width. Their inputs aren't fitted: the fit isn't even called."""

    def refuse(*_: Any) -> None:
        raise AssertionError("inputs of neurons were fitted")

    thorough = run_slice("llama", keep=0.85, multiple=4)
    assert len(thorough.manifest["trials"]) > 1
    monkeypatch.setattr(reader_step, "fit_readers", refuse)
    manifest = run_slice("llama", keep=0.85, multiple=4, effort="fast").manifest
    plan = manifest["plan"]
    assert manifest["trials"] == []
    assert plan["width"] == manifest["dense_width"]
    assert plan["neurons"] < manifest["dense_neurons"], "the same number in each block"
    assert not plan.get("dropped_blocks")
    assert manifest["refitted"]
    assert json.loads(json.dumps(manifest["options"]))["effort"] == "fast"
