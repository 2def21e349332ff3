"""Finding the checkpoint that the user names: a folder, a hub id or a GGUF file."""

from pathlib import Path

from eigenslice.checkpoint.check import CONFIG, check_folder, check_gguf, list_folder
from eigenslice.checkpoint.download import download
from eigenslice.checkpoint.files import check_file
from eigenslice.checkpoint.hub import hub_name
from eigenslice.errors import CheckpointError, first_line

GGUF = ".gguf"


def locate(name: str, adapters: bool = False) -> tuple[Path, str | None]:
    """Find and check a checkpoint: every verb does this first.

    Args:
        name: A folder, a hub id or a .gguf file.
        adapters: True if an adapter may lie beside the weights. Only transformers can apply an adapter.

    Returns:
        The folder and, for a GGUF, the file's name in it.

    Raises:
        CheckpointError: there is no checkpoint, or it can't be read; see `check_folder` and `check_gguf`.
    """
    folder, gguf = _find(name)
    gguf = gguf or _only_gguf(folder)
    if gguf:
        check_gguf(folder / gguf)
    else:
        check_folder(folder, adapters)
    return folder, gguf


def _only_gguf(folder: Path) -> str | None:
    """Name of the GGUF that a folder without config.json holds.

    Raises:
        CheckpointError: it holds several.
    """
    names = list_folder(folder)
    ggufs = [name for name in names if name.lower().endswith(GGUF) and CONFIG not in names]
    if len(ggufs) > 1:
        raise CheckpointError(
            f"{folder} holds {len(ggufs)} GGUF files: {', '.join(ggufs[:5])}",
            allowed="a folder with one GGUF file, or the file itself",
            next_step=f"pass one of them, for example {folder / ggufs[0]}",
        )
    if ggufs:
        check_file(folder / ggufs[0], folder)
    return ggufs[0] if ggufs else None


def _find(name: str) -> tuple[Path, str | None]:
    """The folder and, where the name is that of a GGUF file, the file's name in it."""
    try:
        path = Path(name).expanduser()
        if path.is_file() and path.suffix.lower() == GGUF:
            return path.parent, path.name
        if path.is_dir():
            return path, None
        exists = path.exists() or path.is_symlink()
    except (OSError, RuntimeError):  # no file can have this name, such as one of 300 characters; no such user
        exists = False
    allowed = "a local folder with config.json and safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
    if exists:
        raise CheckpointError(
            f"{name} is neither a folder nor a .gguf file", allowed=allowed, next_step="pass one of these"
        )
    hub = hub_name(name)
    if hub is None:
        raise CheckpointError(f"{name} doesn't exist and is no hub id", allowed=allowed, next_step="check the path")
    try:
        return download(name, hub)
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises its own, requests' and the system's errors
        raise CheckpointError(
            f"{name} doesn't exist here and the hub didn't give it ({first_line(error)})",
            allowed=allowed,
            next_step="check the spelling, the network, and for a gated model `hf auth login`",
        ) from error
