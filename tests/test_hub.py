"""Uploading, with an API that records what it is asked."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError

from eigenslice import hub
from eigenslice.errors import OptionsError, OutputError
from tests.cli.conftest import Command, Failure, command, fails, model  # noqa: F401


class Api:
    """What eigenslice uses of huggingface_hub's."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuses = False

    def whoami(self) -> dict[str, str]:
        return {"name": "someone"}

    def create_repo(self, repo_id: str, **kwargs: Any) -> RepoUrl:
        self.calls.append(("create", {"repo_id": repo_id} | kwargs))
        return RepoUrl(f"https://huggingface.co/someone/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, **kwargs: Any) -> None:
        if self.refuses:
            raise OSError("quota")
        files = sorted(path.name for path in Path(kwargs["folder_path"]).iterdir())
        self.calls.append(("upload", {"repo_id": kwargs["repo_id"], "files": files}))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """The one that eigenslice gets."""
    recorder = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: recorder)
    return recorder


def test_slice_uploads_what_it_wrote(
    api: Api,
    command: Command,  # noqa: F811
    model: Path,  # noqa: F811
    calibration: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    arguments = ["--width", 24, "--calibration", calibration, "--push-to-hub", "small", "--private", "-q"]
    outcome = command("slice", model, "-o", output, *arguments)
    assert outcome.code == 0, outcome
    assert outcome.err == "https://huggingface.co/someone/small\n"
    files = sorted(path.name for path in output.iterdir())
    assert {"README.md", "config.json", "eigenslice.json", "model.safetensors", "tokenizer.json"} <= set(files)
    created = {"repo_id": "small", "private": True, "exist_ok": True}
    assert api.calls == [("create", created), ("upload", {"repo_id": "someone/small", "files": files})]


def test_a_wrong_name_is_refused_before_the_work(
    api: Api,
    fails: Failure,  # noqa: F811
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    message = fails("slice", model, "-o", tmp_path / "out", "--width", 24, "--push-to-hub", "a/b/c")
    assert "--push-to-hub a/b/c" in message
    assert not (tmp_path / "out").exists()


def test_nobody_is_logged_in(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no token")

    monkeypatch.setattr(api, "whoami", refuse)
    with pytest.raises(OptionsError, match="the hub doesn't know you"):
        hub.check_hub("someone/small")


def test_a_refused_upload_leaves_the_folder(api: Api, tmp_path: Path) -> None:
    api.refuses = True
    (tmp_path / "weights").write_text("precious")
    with pytest.raises(OutputError, match="could not be uploaded") as caught:
        hub.push(tmp_path, "someone/small")
    assert f"hf upload someone/small {tmp_path}" in str(caught.value)
    assert (tmp_path / "weights").exists()
    assert issubclass(HfHubHTTPError, OSError)
