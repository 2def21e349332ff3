"""~ in the paths that a user gives."""

import getpass
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eigenslice.errors import OptionsError
from eigenslice.options.evaluation import TaskOptions
from eigenslice.options.exporting import ExportOptions
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.options.paths import expanded
from eigenslice.options.sampling import SampleOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.report import ReportOptions
from tests.cli.conftest import Command, Failure, command, fails, model, text  # noqa: F401
from tests.messages import check_message

Options = Callable[[str], Any]
OPTIONS: list[Options] = [
    lambda path: SliceOptions(model="m", output=path, keep=0.5).output,  # pyright: ignore[reportArgumentType]
    lambda path: SliceOptions(model="m", output="o", recipe=path).recipe,  # pyright: ignore[reportArgumentType]
    lambda path: ExportOptions(model="m", output=path, to="onnx").output,  # pyright: ignore[reportArgumentType]
    lambda path: FinetuneOptions(model="m", output=path).output,  # pyright: ignore[reportArgumentType]
    lambda path: SampleOptions(model="m", output=path + ".json").output.with_suffix(""),  # pyright: ignore
    *(
        lambda path, name=name: getattr(ReportOptions(**{"folder": "f"} | {name: path}), name)  # pyright: ignore
        for name in ("folder", "output", "perplexity", "tasks", "bench")
    ),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a current folder elsewhere."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_path_in_options_is_expanded(option: Options, home: Path) -> None:
    assert option("~/x") == home / "x"
    assert option("x/~") == Path("x/~")
    with pytest.raises(OptionsError) as caught:
        option("~no-such-user/x")
    check_message(caught.value, "~no-such-user/x", "no user no-such-user")


def test_the_folder_of_tasks_is_expanded(home: Path) -> None:
    (home / "tasks").mkdir()
    assert TaskOptions(tasks=("piqa",), include_path=Path("~/tasks")).include_path == home / "tasks"


def test_another_users_home() -> None:
    assert expanded(f"~{getpass.getuser()}/x").is_absolute()


def test_slicing_into_the_home_folder(
    command: Command,  # noqa: F811
    model: Path,  # noqa: F811
    calibration: Path,
    home: Path,
) -> None:
    model.rename(home / "model")
    (home / "plan.yaml").write_text("width: 24")
    calibration_copy = home / calibration.name
    calibration_copy.write_bytes(calibration.read_bytes())
    paths = ["~/model", "-o", "~/out", "--recipe", "~/plan.yaml", "--calibration", f"~/{calibration.name}"]
    outcome = command("slice", *paths)
    assert outcome.code == 0, outcome
    assert outcome.out.startswith(f"{home}/out: ")
    assert json.loads((home / "out" / "eigenslice.json").read_text())["options"]["output"] == f"{home}/out"
    report = command("report", "~/out", "-o", "~/page.html")
    assert report.code == 0, report
    assert (home / "page.html").is_file()
    assert list(Path().iterdir()) == []


def test_sampling_into_the_home_folder(
    command: Command,  # noqa: F811
    model: Path,  # noqa: F811
    home: Path,
) -> None:
    model.rename(home / "model")
    outcome = command("sample", "~/model", "-o", "~/own.json", "--samples", 1, "--seqlen", 8, "-q", "--json")
    assert outcome.code == 0, outcome
    assert outcome.json["output"] == f"{home}/own.json"
    assert (home / "own.json").is_file()
    assert list(Path().iterdir()) == []


def test_a_home_of_nobody_ends_before_the_work(
    fails: Failure,  # noqa: F811
    model: Path,  # noqa: F811
    home: Path,
) -> None:
    assert "no user nobody-here" in fails("slice", model, "-o", "~nobody-here/out", "--width", 24)
    assert "~nobody-here/m" in fails("slice", "~nobody-here/m", "-o", "out", "--width", 24)
    assert list(Path().iterdir()) == []


def test_the_folder_of_logs_is_expanded(
    command: Command,  # noqa: F811
    model: Path,  # noqa: F811
    calibration: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs = []

    def events(folder: Path | None) -> None:
        logs.append(folder)

    monkeypatch.setattr("eigenslice.cli.console._events", events)  # tensorboard isn't installed everywhere
    outcome = command("slice", model, "-o", "out", "--width", 24, "--calibration", calibration, "--log-dir", "~/logs")
    assert outcome.code == 0, outcome
    assert logs == [home / "logs"]
