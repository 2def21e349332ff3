"""Uploading a result to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import LocalTokenNotFoundError, validate_repo_id

from eigenslice.errors import OptionsError, OutputError, first_line


def check_hub(repository: str) -> None:
    """Refuse, before the work, what can't be uploaded in the end.

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
