"""Uploading, with an API that records what it is asked."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError

from eigenslice.checkpoint import hub
from eigenslice.checkpoint.hub import HubName
from eigenslice.errors import OptionsError, OutputError
from tests.checkpoint import fake_hub
from tests.cli.conftest import Command, Failure, command, fails, model  # noqa: F401
from tests.messages import check_message


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", HubName("gpt2")),
        ("org/name", HubName("org/name")),
        ("org/name@v1.0", HubName("org/name", None, "v1.0")),
        ("org/name@refs/pr/1", HubName("org/name", None, "refs/pr/1")),
        ("org/name/a.gguf", HubName("org/name", "a.gguf")),
        ("org/name/F16/a.GGUF@main", HubName("org/name", "F16/a.GGUF", "main")),
        ("org/name/a.safetensors", None),
        ("org/name/../a.gguf", None),
        ("org/name@", None),
        ("org/name@a/../b", None),
        ("./name", None),
        ("/org/name", None),
        ("~/name", None),
        ("", None),
    ],
)
def test_names_on_the_hub(name: str, expected: HubName | None) -> None:
    assert hub.hub_name(name) == expected


def test_a_revision_stands_behind_the_name() -> None:
    assert hub.with_revision("org/name", None) == "org/name"
    assert hub.with_revision("org/name", "v1") == "org/name@v1"
    assert hub.with_revision("org/name/a.gguf", "refs/pr/1") == "org/name/a.gguf@refs/pr/1"


@pytest.mark.parametrize("verb", [["slice", "--width", 24], ["inspect"], ["export", "--to", "gguf"], ["sample"]])
def test_a_folder_has_no_revision(
    verb: list,
    fails: Failure,  # noqa: F811
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    output = [] if verb[0] == "inspect" else ["-o", tmp_path / "out.json"]
    message = fails(verb[0], model, *output, *verb[1:], "--revision", "v1")
    assert "--revision v1" in message
    assert "only models on the hub have revisions" in message


@pytest.mark.parametrize(
    ("model_name", "revision", "words"),
    [
        ("org/name@v1", "v2", "names a revision already"),
        ("org/name", "a b", "no name"),
        ("no/such/dir", "v1", "no name"),
    ],
)
def test_revisions_that_cannot_be_are_refused(model_name: str, revision: str, words: str) -> None:
    with pytest.raises(OptionsError) as caught:
        hub.with_revision(model_name, revision)
    check_message(caught.value, f"--revision {revision}", words)


def test_slice_takes_a_revision_and_records_its_commit(
    command: Command,  # noqa: F811
    model: Path,  # noqa: F811
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fake_hub.cache(tmp_path / "hub", "org/name", fake_hub.files_of(model), revision="v1")
    arguments = ["--width", 24, "--calibration", calibration, "-q", "--json", "-o"]
    outcomes = [
        command("slice", "org/name", "--revision", "v1", *arguments, tmp_path / "first"),
        command("slice", "org/name@v1", *arguments, tmp_path / "second"),
        command("slice", model, *arguments, tmp_path / "third"),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    sources = [outcome.json["source"] for outcome in outcomes]
    assert [source["revision"] for source in sources] == [fake_hub.COMMIT, fake_hub.COMMIT, None]
    assert [source["name"] for source in sources[:2]] == ["org/name@v1", "org/name@v1"]
    assert "base_model: org/name\n" in (tmp_path / "first" / "README.md").read_text()
    assert not [path for path in (tmp_path / "first").rglob("*") if path.is_symlink()]
