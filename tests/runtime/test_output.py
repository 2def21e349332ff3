"""An output that can't become a new file or folder is refused before any work."""

from pathlib import Path

import pytest
from filelock import FileLock

from eigenslice.errors import OutputError
from eigenslice.runtime.output import check_output, partial_path
from tests.messages import check_message


@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_an_output_below_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "file" / below)
    check_message(caught.value, str(tmp_path / "file"), "is not a folder")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/out", "deep/../nowhere"])
def test_a_symbolic_link_that_leads_nowhere_is_seen_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / name)
    check_message(caught.value, "nowhere")


@pytest.mark.parametrize("name", ["", ".", "..", "new/..", "a\0b"])
def test_a_name_that_can_not_be_made_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError) as caught:
        check_output(Path(name))
    check_message(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "model"),
    [
        ("model", "model"),
        ("model/small", "model"),
        ("model/deep/small", "model"),
        ("link/small", "model"),
        ("model/small", "link"),
        ("around", "around.partial/model"),
        ("around", "around.partial"),
        ("file.gguf/out", "file.gguf"),
    ],
)
def test_an_output_that_is_an_input_or_in_it_or_around_it_is_refused(output: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "around.partial" / "model").mkdir(parents=True)
    (tmp_path / "file.gguf").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / output, inputs=[tmp_path / model])
    check_message(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_beside_an_input_is_fine(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "file.gguf").touch()
    check_output(tmp_path / "model-small", inputs=[tmp_path / "model", tmp_path / "file.gguf", Path("org/name")])


def test_long_names_do_not_share_a_work_folder() -> None:
    one, other = (partial_path(Path("x" * 240 + end)) for end in "ab")
    assert one != other
    assert len(one.name.encode()) < 255


def test_a_run_that_is_alive_is_never_called_interrupted(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "current.json").touch()
    (partial / "run.json").touch()
    for resume in (False, True):
        with FileLock(partial / "lock"), pytest.raises(OutputError) as caught:
            check_output(tmp_path / "out", resume)
        check_message(caught.value, "another process is writing")
        assert "remove" not in caught.value.next_step
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "out")
    check_message(caught.value, "holds an interrupted run")
