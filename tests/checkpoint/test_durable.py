"""A file appears whole, after its content has reached the disk."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from eigenslice.errors import OutputError
from eigenslice.runtime.durable import flush_all, replace_json, write_whole
from tests.messages import check_message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_whole(path, "größe")
    write_whole(path, "another")
    assert path.read_text(encoding="utf-8") == "another"
    assert names(path.parent) == ["page.html"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".page.html.eigenslice-new").write_text("half of a pa")
    write_whole(tmp_path / "page.html", "page")
    assert names(tmp_path) == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "page"


def test_two_processes_at_one_file_are_refused(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".page.html.eigenslice-new"), pytest.raises(OutputError) as caught:
        write_whole(tmp_path / "page.html", "page")
    check_message(caught.value, "another process is writing")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_a_folder_that_can_not_be_written_to_is_called_that() -> None:
    with pytest.raises(OutputError) as caught:
        write_whole(Path("/proc/page.html"), "page")
    check_message(caught.value, "writing /proc/page.html failed")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "page.html", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as caught:
        write_whole(tmp_path / "page.html", "new")
    check_message(caught.value, "No space left on device")
    assert (tmp_path / "page.html").read_text() == "old"
    assert names(tmp_path) == ["page.html"]


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, names(tmp_path)))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    replace_json(tmp_path / "state.json", {"a": 1})
    assert seen == [("state.json.new", ["state.json.new"]), (tmp_path.name, ["state.json"])]


def test_everything_in_a_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").touch()
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda d: flushed.append(Path(f"/proc/self/fd/{d}").readlink().name))
    flush_all(tmp_path)
    assert flushed == ["file", "deep", tmp_path.name]
