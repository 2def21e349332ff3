"""Names of models on the Hugging Face hub, and uploading a result to it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import LocalTokenNotFoundError, validate_repo_id

from eigenslice.errors import OptionsError, OutputError, first_line

REVISION = re.compile(r"\w[\w./+-]*")
"""Pattern of branches, tags, pull requests (refs/pr/1) and commits. No match leads out of a folder, see `hub_name`."""


@dataclass(frozen=True)
class HubName:
    """A model on the hub: NAME, OWNER/NAME or OWNER/NAME/FILE.gguf, and @REVISION behind each of them.

    Attributes:
        repository: NAME or OWNER/NAME.
        file: A GGUF file in it, None if the user named none.
        revision: Branch, tag or commit, None if the user named none.
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    @property
    def suffix(self) -> str:
        """The text behind repository and file."""
        return f"@{self.revision}" if self.revision else ""


def hub_name(name: str) -> HubName | None:
    """Read a name as one on the hub; None if it can't be one. Whether there is a file or folder of it isn't asked."""
    place, at, revision = name.partition("@")
    parts = place.split("/")
    file = "/".join(parts[2:]) or None
    if at and (not REVISION.fullmatch(revision) or ".." in revision):
        return None
    if file and (not file.lower().endswith(".gguf") or {"", ".", ".."} & set(parts[2:])):
        return None
    repository = "/".join(parts[:2])
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return HubName(repository, file, revision or None)


def with_revision(model: str, revision: str | None) -> str:
    """MODEL@REVISION for a model and the option --revision.

    Raises:
        OptionsError: the model is a file or folder here, or names a revision already.
    """
    if revision is None:
        return model
    given = f"--revision {revision} with {model}"
    if "@" in model and hub_name(model):
        raise OptionsError(
            f"{given}, which names a revision already",
            allowed="one of them: --revision, or MODEL@REVISION",
            next_step="leave --revision out",
        )
    named = hub_name(f"{model}@{revision}")
    if is_local(model) or not named:
        what = "which is a path here: only models on the hub have revisions" if is_local(model) else "which is no name"
        raise OptionsError(
            f"{given}, {what}",
            allowed="a branch, tag or commit of a model on the hub, such as OWNER/NAME --revision v1.0",
            next_step="leave --revision out, or name a model on the hub",
        )
    return f"{model}@{revision}"


def is_local(name: str) -> bool:
    """Return whether a file or folder of this name is here."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no file can have this name, or no such user
        return False


def check_hub(repository: str) -> None:
    """Refuse, before the work, a repository that can't take the upload in the end.

    Raises:
        OptionsError: no repository's name, nobody is logged in, or the hub can't be reached.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionsError(
            f"--push-to-hub {repository}: {str(error).splitlines()[0]}",
            allowed="OWNER/NAME, or NAME for your own account",
            next_step="correct the name",
        ) from error
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise OptionsError(
            f"--push-to-hub {repository}: the hub doesn't know you ({first_line(error)})",
            allowed="an account that may write there",
            next_step="run `hf auth login`, and check the network",
        ) from error


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder; gives its address.

    Raises:
        OutputError: the hub refused it. The folder is complete, and can be uploaded later.
    """
    api: Any = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload a model sliced by eigenslice"
        )
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(
            f"{folder} could not be uploaded to {repository} ({first_line(error)})",
            allowed="a repository that you may write to",
            next_step=f"the folder is complete: `hf upload {repository} {folder}`",
        ) from error
    return str(address)
