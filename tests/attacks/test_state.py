"""A state that isn't as it was written never leads to another result: its stage begins anew, or one message says so."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from eigenslice.errors import EigensliceError, EigensliceWarning
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.runtime import run_state as resume
from eigenslice.runtime.output import partial_path
from eigenslice.slicing import slice_model
from tests.attacks.disk import flip
from tests.conftest import Folders

RUNS: dict[str, dict[str, Any]] = {
    "fitted": {"width": 24, "neurons": 40},
    "planned": {"keep": 0.75, "heads": False, "depth": False},
    "per-block": {"width": 24, "basis": "per-block", "offload": "disk"},
}
MOMENTS = {"fitted": 11, "planned": 18, "per-block": 4}
"""Reports of progress after which a run is interrupted, with some of its last pass done."""


class Interrupted:
    """A run that was interrupted in its last pass, and the result of an uninterrupted one."""

    def __init__(self, kind: str, model: Path, calibration: Path, folder: Path) -> None:
        self.folder = folder
        self._options = SliceOptions(
            model=str(model),
            output=folder / "out",
            calibration=CalibrationOptions(data=str(calibration)),
            **RUNS[kind],
        )
        slice_model(self._options)
        self.expected = self._content()
        shutil.rmtree(folder / "out")
        with pytest.raises(KeyboardInterrupt):
            slice_model(self._options, self._stop(MOMENTS[kind]))
        shutil.copytree(partial_path(folder / "out"), folder / "kept")

    def files(self) -> list[Path]:
        """All files of the interrupted run, relative to its folder."""
        paths = (self.folder / "kept").rglob("*")
        return sorted(p.relative_to(self.folder / "kept") for p in paths if p.is_file() and p.name != "lock")

    def restore(self) -> Path:
        """Put the interrupted run back; its folder."""
        partial = partial_path(self.folder / "out")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        shutil.copytree(self.folder / "kept", partial)
        return partial

    def resume(self) -> tuple[dict[str, bytes] | None, list[str]]:
        """Go on; what is in the result (None where one message ends the run), and the warnings."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EigensliceWarning)
            try:
                slice_model(self._options.model_copy(update={"resume": True}))
            except EigensliceError as error:
                return None, [str(error)]
        return self._content(), [str(w.message) for w in caught]

    def _content(self) -> dict[str, bytes]:
        folder = self.folder / "out"
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("eigenslice.json", "README.md")}

    @staticmethod
    def _stop(at: int) -> Any:
        left = [at]

        def report(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        return report


@pytest.fixture
def interrupted(
    request: pytest.FixtureRequest,
    dense_folder: Folders,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Interrupted:
    monkeypatch.setattr(resume, "SHARE", 1.0)
    return Interrupted(request.param, dense_folder("llama"), calibration, tmp_path)


@pytest.mark.parametrize("interrupted", RUNS, indirect=True)
def test_one_flipped_bit_anywhere_never_leads_to_another_result(interrupted: Interrupted) -> None:
    files = interrupted.files()
    assert any(path.parts[0] == "state" for path in files)
    assert any(path.name == "model.safetensors" for path in files)
    noticed = 0
    for number, path in enumerate(files):
        partial = interrupted.restore()
        flip(partial / path, (number * 0.37 + 0.2) % 1)
        content, said = interrupted.resume()
        if content is None:
            assert path.name == "run.json", (path, said)
            continue
        assert content == interrupted.expected, path
        noticed += any("begins anew" in line for line in said)
        if path.parts[0] == "state":
            assert any("begins anew" in line for line in said), path
    assert noticed


@pytest.mark.parametrize("interrupted", ["fitted"], indirect=True)
def test_a_missing_file_never_leads_to_another_result(interrupted: Interrupted) -> None:
    for path in interrupted.files():
        partial = interrupted.restore()
        (partial / path).unlink()
        content, said = interrupted.resume()
        if content is None:
            assert path.name == "run.json", (path, said)
        else:
            assert content == interrupted.expected, path


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"sha256": 1}'], ids=repr
)
@pytest.mark.parametrize("interrupted", ["fitted"], indirect=True)
def test_a_tampered_current_json_begins_the_run_anew(content: bytes, interrupted: Interrupted) -> None:
    partial = interrupted.restore()
    (partial / "state" / "current.json").write_bytes(content)
    found, said = interrupted.resume()
    assert found == interrupted.expected
    assert any("begins anew" in line for line in said)


@pytest.mark.parametrize("interrupted", ["fitted"], indirect=True)
def test_without_damage_nothing_is_said_and_the_result_is_the_same(interrupted: Interrupted) -> None:
    interrupted.restore()
    content, said = interrupted.resume()
    assert content == interrupted.expected
    assert said == []
