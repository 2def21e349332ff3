"""The output appears complete or not at all; what is interrupted can go on; only what a run made is removed."""

import json
from pathlib import Path
from typing import Any

import pytest

from eigenslice.errors import ActivationError, IncompleteError, OptionsError, OutputError
from eigenslice.runtime.output import check_output, partial_path
from eigenslice.runtime.work_folder import WorkFolder, remove_finished, work_folder
from tests.messages import check_message

IDENTITY = {"version": "1", "option": {"width": 24, "seed": 0}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def complete(output: Path, identity: dict[str, Any] = IDENTITY, resume: bool = False) -> None:
    with work_folder(output, identity, ["file"], resume) as work:
        write(work)


def write(work: WorkFolder, text: str = "content") -> None:
    work.result.mkdir(exist_ok=True)
    (work.result / "file").write_text(text)


def fail(output: Path, error: BaseException, state: bool = True, made: str = "") -> None:
    """Write into the folder, and a file beside it if it has a name, and then fail."""
    with work_folder(output, IDENTITY, ["file"]) as work:
        write(work, "old")
        if state:
            (work.state / "current.json").write_text("{}")
        if made:
            (work.path.parent / made).touch()
        raise error


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep" / "out"
    with work_folder(output, IDENTITY, ["file"]) as work:
        write(work)
        assert names(output.parent) == ["out.partial"]
    assert names(output.parent) == ["out"]
    assert (output / "file").read_text() == "content"
    assert output.stat().st_mode & 0o777 == 0o755


def test_a_relative_output_is_written_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    complete(Path("deep/out"))
    assert (tmp_path / "deep" / "out" / "file").exists()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_was_interrupted_stays_to_go_on_from(error: BaseException, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with pytest.raises(type(error)) as caught:
        fail(output, error)
    assert caught.value is error
    assert names(tmp_path / "new") == ["out.partial"]
    with pytest.raises(OutputError) as refused:
        check_output(output)
    check_message(refused.value, "out.partial holds an interrupted run")
    assert "--resume" in refused.value.allowed
    with work_folder(output, IDENTITY, ["file"], resume=True) as work:
        assert (work.result / "file").read_text() == "old"
        assert names(work.state) == ["current.json"]
    assert names(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_nothing_stays_where_there_is_nothing_to_go_on_from(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "new" / "deep" / "out", error, state=False)
    assert names(tmp_path) == []


def test_nothing_stays_after_an_error_that_would_come_again(tmp_path: Path) -> None:
    with pytest.raises(ActivationError):
        fail(tmp_path / "new" / "out", ActivationError("NaN", allowed="", next_step=""))
    assert names(tmp_path) == []


def test_folders_that_were_there_or_hold_something_stay(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError):
        fail(tmp_path / "old" / "new" / "out", RuntimeError(), state=False, made="of-somebody-else")
    assert names(tmp_path / "old") == ["new"]
    assert names(tmp_path / "old" / "new") == ["of-somebody-else"]


def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(IncompleteError) as caught:
        fail(tmp_path / "new" / "out", full)
    check_message(caught.value, str(tmp_path / "new" / "out"), "No space left on device")
    assert "--resume" in caught.value.next_step
    assert caught.value.__cause__ is full
    complete(tmp_path / "new" / "out", resume=True)
    assert names(tmp_path / "new") == ["out"]


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt())
    before = {path.name: path.read_text() for path in partial_path(tmp_path / "out").glob("*.json")}
    for identity, found in (
        ({"version": "2", "option": {"width": 24, "seed": 0}}, "version was 1, is 2"),
        ({"version": "1", "option": {"width": 20, "seed": 1}}, "option seed was 0, is 1; option width was 24, is 20"),
        ({"version": "1", "option": {"width": 24}}, "option seed was 0, is None"),
    ):
        with pytest.raises(OptionsError) as caught:
            complete(tmp_path / "out", identity, resume=True)
        check_message(caught.value, found)
    assert {path.name: path.read_text() for path in partial_path(tmp_path / "out").glob("*.json")} == before
    complete(tmp_path / "out", json.loads(json.dumps(IDENTITY)), resume=True)


def test_to_resume_what_was_never_begun_is_to_begin(tmp_path: Path) -> None:
    complete(tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out"]


def test_two_at_the_same_output_are_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", IDENTITY, ["file"]) as work:
        write(work)
        with pytest.raises(OutputError) as caught:
            complete(tmp_path / "out", resume=True)
        check_message(caught.value, "another process is writing")
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_an_output_that_exists_is_refused_and_left_alone(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "out")
    for resume in (True, False):
        with pytest.raises(OutputError) as caught:
            complete(tmp_path / "out", resume=resume)
        check_message(caught.value, str(tmp_path / "out"), "exists already")
    assert names(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_left_alone_and_the_result_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def be_overtaken() -> None:
        with work_folder(output, IDENTITY, ["file"]) as work:
            write(work)
            (work.state / "current.json").write_text("{}")
            output.mkdir()

    with pytest.raises(IncompleteError) as caught:
        be_overtaken()
    check_message(caught.value, "meanwhile")
    assert names(output) == []
    assert (partial_path(output) / "result" / "file").read_text() == "content"


@pytest.mark.parametrize("name", ["x" * 300, f"new/{'x' * 300}"], ids=["here", "in-a-new-folder"])
def test_a_name_that_the_file_system_refuses_is_an_output_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        complete(tmp_path / name)
    check_message(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127], ids=["ascii", "two-bytes"])
def test_a_name_as_long_as_the_file_system_takes_works(name: str, tmp_path: Path) -> None:
    """The partial folder's must then be shorter."""
    complete(tmp_path / name)
    assert names(tmp_path) == [name]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_a_parent_that_can_not_be_written_to_is_an_output_error() -> None:
    with pytest.raises(OutputError) as caught:
        complete(Path("/proc/eigenslice/out"))
    check_message(caught.value, "/proc/eigenslice/out")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    "files",
    [
        ["notes.txt"],
        ["config.json", "model.safetensors"],
        ["result/model.safetensors"],
        ["state/current.json"],
        ["lock", "notes.txt"],
        ["deep/er/notes.txt"],
    ],
    ids=str,
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_eigenslice_did_not_make_is_refused_and_left_alone(
    files: list[str], resume: bool, tmp_path: Path
) -> None:
    for name in files:
        path = partial_path(tmp_path / "out") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError) as caught:
        complete(tmp_path / "out", resume=resume)
    check_message(caught.value, "out.partial")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"made by": "me"}', "[" * 100_000, "\x00"], ids=repr)
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_json_that_is_not_ours_is_refused_and_left_alone(content: str, resume: bool, tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "out")
    (partial / "state").mkdir(parents=True)
    (partial / "run.json").write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError) as caught:
        complete(tmp_path / "out", resume=resume)
    check_message(caught.value, "run.json can't be read")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["notes.txt", "result/notes.txt", "state/notes.txt", "companions/notes.txt"])
def test_what_somebody_put_into_an_interrupted_run_is_refused_and_left_alone(where: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt())
    (partial_path(tmp_path / "out") / where).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError) as caught:
        complete(tmp_path / "out", resume=True)
    check_message(caught.value, where)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["notes.txt", "result/notes.txt", "state/notes.txt"])
@pytest.mark.parametrize("error", [ActivationError("NaN", allowed="", next_step=""), KeyboardInterrupt()], ids=repr)
def test_what_somebody_puts_in_meanwhile_stays_when_a_run_fails(
    error: BaseException, where: str, tmp_path: Path
) -> None:
    def disturb() -> None:
        with work_folder(tmp_path / "out", IDENTITY, ["file"]) as work:
            write(work)
            (work.path / where).write_text("mine")
            raise error

    with pytest.raises(type(error)):
        disturb()
    assert (partial_path(tmp_path / "out") / where).read_text() == "mine"


def test_what_somebody_puts_into_the_result_meanwhile_never_ends_up_in_the_output(tmp_path: Path) -> None:
    def disturb() -> None:
        with work_folder(tmp_path / "out", IDENTITY, ["file"]) as work:
            write(work)
            (work.state / "current.json").write_text("{}")
            (work.result / "notes.txt").write_text("mine")

    with pytest.raises(IncompleteError) as caught:
        disturb()
    check_message(caught.value, "notes.txt")
    assert not (tmp_path / "out").exists()
    assert (partial_path(tmp_path / "out") / "result" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "result/model.safetensors", "run.json", "lock", "state"])
def test_nothing_is_written_or_removed_through_a_symbolic_link(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    link = partial_path(tmp_path / "out") / name if name else partial_path(tmp_path / "out")
    if name:
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / "out", KeyboardInterrupt())
        if link.is_dir():
            link.rename(tmp_path / "moved")
        link.unlink(missing_ok=True)
    link.symlink_to(precious if link.name in ("state", "out.partial") else precious / "file")
    with pytest.raises(OutputError):
        complete(tmp_path / "out", resume=True)
    assert (precious / "file").read_text() == "mine"


def test_a_file_in_the_place_of_the_work_folder_is_refused(tmp_path: Path) -> None:
    partial_path(tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError) as caught:
        complete(tmp_path / "out")
    check_message(caught.value, "out.partial")
    assert partial_path(tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("killed", ["at-once", "before-any-state"])
def test_a_run_that_was_killed_before_it_saved_anything_is_begun_anew_with_other_options(
    killed: str, tmp_path: Path
) -> None:
    partial = partial_path(tmp_path / "out")
    if killed == "at-once":
        partial.mkdir()
        (partial / "lock").touch()
    else:
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / "out", KeyboardInterrupt())
        (partial / "state" / "current.json").unlink()
        (partial / "offload" / "000").mkdir()
    complete(tmp_path / "out", {"other": 1})
    assert names(tmp_path) == ["out"]


def test_a_lasting_error_of_a_resumed_run_removes_nothing_of_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt())

    def run(identity: dict[str, Any]) -> None:
        with work_folder(tmp_path / "out", identity, ["file"], resume=True):
            raise ActivationError("NaN", allowed="", next_step="")

    for identity, kind in ((IDENTITY, ActivationError), ({"version": "2"}, OptionsError)):
        with pytest.raises(kind):
            run(identity)
        assert (partial_path(tmp_path / "out") / "state" / "current.json").exists()
    complete(tmp_path / "out", resume=True)


def test_a_single_file_can_be_the_result(tmp_path: Path) -> None:
    with work_folder(tmp_path / "model.gguf", {"verb": "export"}) as work:
        work.result.write_text("content")
    assert names(tmp_path) == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "content"


def test_what_a_run_left_that_was_killed_after_its_last_step_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt())
    (partial_path(tmp_path / "out") / "result").rename(tmp_path / "out")
    remove_finished(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    partial_path(tmp_path / "out").mkdir()
    (partial_path(tmp_path / "out") / "notes.txt").touch()
    (partial_path(tmp_path / "out") / "lock").touch()
    remove_finished(tmp_path / "out")
    assert names(partial_path(tmp_path / "out")) == ["lock", "notes.txt"]
