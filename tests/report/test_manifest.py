"""Manifests that were tampered with: one message before anything is done with them."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenslice.errors import CheckpointError
from eigenslice.report.figures import energy, parameters_by_role, refit_errors, spectra, training
from eigenslice.report.manifest import NAME, finished_manifest, read_manifest
from eigenslice.report.page import Texts, render
from tests.conftest import Slicer
from tests.json_changes import changed, places
from tests.messages import check_message

TRAINING: dict[str, Any] = {
    "trained": "all weights",
    "steps": 2,
    "teacher": None,
    "data": {"data": [{"data": "x.txt", "sequences": 3}], "sequences": 3, "tokens": 12},
    "perplexity": {"before": 9.0, "after": 8.0, "tokens": 5},
    "loss": [[1, 2.0]],
    "held_out_loss": [[2, 1.75]],
    "options": {"model": "small", "output": "tuned", "full": True},
}


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory, dense_folder: Any, calibration: Path) -> dict[str, Any]:
    """A manifest that slicing wrote, with what fine-tuning adds."""
    from eigenslice.options.calibration_text import CalibrationOptions
    from eigenslice.options.slicing import SliceOptions
    from eigenslice.slicing import slice_model

    output = tmp_path_factory.mktemp("manifest") / "out"
    data = CalibrationOptions(data=str(calibration))
    options = SliceOptions(model=str(dense_folder("llama")), output=output, width=24, calibration=data)
    return slice_model(options).manifest | {"finetune": TRAINING}


def use(content: Any) -> None:
    """All that reads a manifest."""
    plots = [parameters_by_role(content), spectra(content), energy(content), refit_errors(content), training(content)]
    sections: dict[str, Any] = {name: [] for name in ("spectrum", "quality", "speed", "training")}
    page = render(content, "x", sections | {"cut": [plot for plot in plots if plot]}, None, Texts([], None))
    assert "<script>alert" not in page


def read(content: Any, folder: Path) -> Any:
    text = json.dumps(content)
    (folder / NAME).write_text(text, encoding="utf-8")
    return read_manifest(folder)


def test_the_genuine_one_is_read_as_it_is(genuine: dict[str, Any], tmp_path: Path) -> None:
    assert read(genuine, tmp_path) == genuine
    use(genuine)
    assert read_manifest(tmp_path / "nothing") is None


VALUES: tuple[Any, ...] = (..., None, [], -1, "<script>alert(1)", math.nan, 10**300, [[[0]]])
USED = 5  # of so many that are accepted, one is used


def test_any_field_may_be_another(genuine: dict[str, Any], tmp_path: Path) -> None:
    """Each change is refused in one message, or everything that reads a manifest gets along with it."""
    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.setattr("plotly.offline.get_plotlyjs", lambda: "")
    outcomes = {True: 0, False: 0}
    try:
        for place in list(places({name: value for name, value in genuine.items() if name not in ("run", "sha256")})):
            for value in VALUES if place else ():
                try:
                    content = read(changed(genuine, place, value), tmp_path)
                except CheckpointError as error:
                    check_message(error, str(tmp_path / NAME))
                    outcomes[False] += 1
                else:
                    outcomes[True] += 1
                    if outcomes[True] % USED == 0:
                        use(content)
    finally:
        monkeypatched.undo()
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"NaN", b"\xff", b"[" * 10**6, b'{"a":' * 10**5, b"9" * 5000, b" " * 17 * 2**20],
    ids=lambda content: repr(content[:10]),
)
def test_what_is_no_manifest(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    for reading in (read_manifest, lambda folder: finished_manifest(folder, {})):
        with pytest.raises(CheckpointError) as caught:
            reading(tmp_path)
        check_message(caught.value, "is no manifest of eigenslice")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


def test_deep_fields_that_nobody_reads(genuine: dict[str, Any], tmp_path: Path) -> None:
    """Comparing and writing them would end in a RecursionError, after the training."""
    deep: Any = 1
    for _ in range(100):
        deep = {"a": [deep]}
    with pytest.raises(CheckpointError, match="nested deeper"):
        read(genuine | {"own": deep}, tmp_path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4), t, max_size=3))


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_any_content_is_a_manifest_or_one_message(data: st.DataObject, genuine: dict[str, Any]) -> None:
    place = data.draw(st.sampled_from([place for place in places(genuine) if place]))
    content = data.draw(st.just(changed(genuine, place, data.draw(TREES))) | TREES)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read(content, Path(folder))
        except CheckpointError as error:
            check_message(error)
            return
    assert isinstance(found, dict)


def test_custom_results_are_read(run_slice: Slicer) -> None:
    for options in ({"basis": "per-block"}, {"form": "custom"}):
        output = run_slice("llama", width=24, **options).output
        found = read_manifest(output)
        assert found is not None
        use(found)
