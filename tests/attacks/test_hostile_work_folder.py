"""Any content in a work folder's files ends in a run that goes on, begins anew, or says one thing; nothing is lost."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenslice.errors import EigensliceError, EigensliceWarning
from eigenslice.runtime.output import partial_path
from eigenslice.runtime.ranks import ALONE
from eigenslice.runtime.run_state import RunState
from eigenslice.runtime.work_folder import work_folder
from tests.attacks.disk import snapshot
from tests.json_changes import changed, places

IDENTITY: dict[str, Any] = {"version": "1", "option": {"width": 24, "field": ["a"]}, "input": {"model": "0" * 64}}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=4), v, max_size=2))
EXAMPLES = settings(max_examples=60, derandomize=True, deadline=None)


def begin(output: Path) -> None:
    """A run that is interrupted with some of its state saved."""

    def work() -> None:
        with work_folder(output, IDENTITY, ["config.json"]) as folder:
            folder.result.mkdir()
            (folder.result / "config.json").write_text("{}")
            state = RunState(folder.state, ALONE)
            state.finish("measuring", {"moment": torch.eye(2)}, {"kl": [0.5]})
            state.save("slicing", 1, {}, {"sum": torch.ones(2)}, lambda: {"written": {"a": 1}})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


def go_on(output: Path) -> str:
    """Resume; what came of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", EigensliceWarning)
        try:
            with work_folder(output, IDENTITY, ["config.json"], resume=True) as folder:
                state = RunState(folder.state, ALONE)
                result, position = state.result("measuring"), state.position("slicing")
                folder.result.mkdir(exist_ok=True)
                (folder.result / "config.json").write_text("{}")
        except EigensliceError:
            return "refused"
    if result is not None:
        assert torch.equal(result[0]["moment"], torch.eye(2))
        assert result[1] == {"kl": [0.5]}
    if position is not None:
        assert torch.equal(position.tensors["sum"], torch.ones(2))
        assert (position.block, position.content) == (1, {"written": {"a": 1}})
    if result is None or position is None:
        assert said
    return "went on"


def attack(name: str, content: bytes) -> str:
    with TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        begin(output)
        (partial_path(output) / name).write_bytes(content)
        before = snapshot(Path(folder))
        outcome = go_on(output)
        if outcome == "refused":
            assert snapshot(Path(folder)) == before
        return outcome


def original(name: str) -> Any:
    with TemporaryDirectory() as folder:
        begin(Path(folder) / "out")
        return json.loads((partial_path(Path(folder) / "out") / name).read_text())


RUN, CURRENT = original("run.json"), original("state/current.json")


@EXAMPLES
@given(content=st.binary(max_size=200), name=st.sampled_from(["run.json", "state/current.json"]))
def test_any_bytes(content: bytes, name: str) -> None:
    attack(name, content)


@EXAMPLES
@given(place=st.sampled_from(list(places(RUN))[1:]), value=VALUES | st.just(...))
def test_any_value_in_what_the_run_depends_on(place: tuple[str | int, ...], value: Any) -> None:
    attack("run.json", json.dumps(changed(RUN, place, value)).encode())


@EXAMPLES
@given(place=st.sampled_from(list(places(CURRENT))[1:]), value=VALUES | st.just(...))
def test_any_value_in_the_state(place: tuple[str | int, ...], value: Any) -> None:
    assert attack("state/current.json", json.dumps(changed(CURRENT, place, value)).encode()) == "went on"


def test_without_an_attack_it_goes_on(tmp_path: Path) -> None:
    begin(tmp_path / "out")
    assert go_on(tmp_path / "out") == "went on"
    assert (tmp_path / "out" / "config.json").exists()
