"""A model from the Hugging Face hub: only the needed files, or the cached files without network.

Config, weights and tokenizer are required. Licence, generation config and card are downloaded if they are available.
"""

import glob
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from eigenslice.checkpoint import names
from eigenslice.checkpoint.files import check_file, read_json
from eigenslice.checkpoint.hub import HubName
from eigenslice.checkpoint.weights import INDEX, SINGLE
from eigenslice.errors import CheckpointError, EigensliceWarning, first_line


class _Silent(tqdm):
    """No progress bar: for files that are small."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"disable": True}))


@dataclass(frozen=True)
class _Snapshot:
    """One commit of a repository.

    Attributes:
        name: The name that the user wrote.
        repository, commit: The repository's name and the commit's hash.
        files: Names of all files; if the hub was never asked, names of the cached files.
        folder: The folder in the cache.
    """

    name: str
    repository: str
    commit: str
    files: frozenset[str]
    folder: Path

    def here(self, file: str) -> bool:
        """Return whether a file is in the cache."""
        return (self.folder / file).is_file()

    def fetch(self, wanted: Iterable[str], required: Collection[str], silent: bool = True) -> None:
        """Bring files into the cache.

        Raises:
            CheckpointError: one that is required is neither there nor can be had.
        """
        missing = sorted(file for file in set(wanted) if not self.here(file))
        if not missing:
            return
        failure = None
        try:
            # The names are exact, while the hub's client takes patterns
            patterns, bars = [glob.escape(file) for file in missing], _Silent if silent else None
            snapshot_download(self.repository, revision=self.commit, allow_patterns=patterns, tqdm_class=bars)
        except Exception as error:  # the client raises its own, httpx's and the system's errors
            failure = error
        missing = [file for file in missing if not self.here(file)]
        lacking = [file for file in missing if file in required]
        if lacking:
            why = f" ({first_line(failure)})" if failure else ""
            raise self._incomplete(f"lacks {', '.join(lacking[:3])}", why) from failure
        if missing:
            warnings.warn(
                f"{self.name}: {', '.join(missing)} can't be downloaded, and the cache has no copy; the result goes "
                "without.",
                EigensliceWarning,
                stacklevel=2,
            )

    def _incomplete(self, what: str, why: str = "") -> CheckpointError:
        return CheckpointError(
            f"{self.name} {what}: the cache has no copy, and the hub gave none{why}",
            allowed="a repository with config.json, safetensors weights and tokenizer, on the hub or all in the cache",
            next_step="check the name and the network, unset HF_HUB_OFFLINE, and for a gated model `hf auth login`",
        )

    def require_tokenizer(self) -> None:
        """Refuse a repository with a tokenizer that isn't in the cache.

        After a tokenizer was loaded, the cache still lacks the vocabularies that its class doesn't read.
        """
        listed = [file for file in names.VOCABULARIES if file in self.files]
        if listed and not any(map(self.here, listed)):
            raise self._incomplete(f"lacks {listed[0]}")


def download(name: str, hub: HubName) -> tuple[Path, str | None]:
    """Bring a model's files into the hub's cache, and return the folder and, for a GGUF, the file's name.

    Args:
        name: The name that the user wrote.
        hub: The name's parts.

    Raises:
        CheckpointError: files are missing, or none of several GGUF files is named.
        Exception: of the hub's client, where there is no such repository or revision, or it can't be asked.
    """
    snapshot = _open(name, hub)
    gguf = _gguf(snapshot, hub)
    if gguf:
        snapshot.fetch([gguf], [gguf], silent=False)
        return snapshot.folder / PurePosixPath(gguf).parent, PurePosixPath(gguf).name
    if names.CONFIG not in snapshot.files and names.ADAPTER[0] in snapshot.files:
        snapshot.fetch(names.ADAPTER[:1], names.ADAPTER[:1])
        return snapshot.folder, None
    weights = _weights(snapshot)
    required = {names.CONFIG} | {names.TOKENIZER_CONFIG} & snapshot.files
    others = [names.CARD, names.MANIFEST, *names.ADAPTER]
    wanted = {file for file in snapshot.files if names.is_companion(file) or file in others}
    snapshot.fetch(required | wanted, required)
    snapshot.require_tokenizer()
    snapshot.fetch(names.linked_licence(snapshot.folder) & snapshot.files, [])
    _fetch_code(snapshot)
    snapshot.fetch(weights, weights, silent=False)
    return snapshot.folder, None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in a hub's cache holds, None for any other folder."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.name
    return None


def _open(name: str, hub: HubName) -> _Snapshot:
    offline = constants.is_offline_mode()
    revision = HfApi().resolve_revision(hub.repository, revision=hub.revision, local_files_only=offline)
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    repository = cache / repo_folder_name(repo_id=hub.repository, repo_type="model")
    folder = repository / "snapshots" / revision.resolved
    return _Snapshot(name, hub.repository, revision.resolved, _files(hub.repository, revision.resolved, folder), folder)


def _files(repository: str, commit: str, folder: Path) -> frozenset[str]:
    """Return names of a repository's files: from an earlier answer of the hub, from the hub now, or from the cache."""
    try:
        return frozenset(file.path for file in get_cached_repo_tree(repository, revision=commit))
    except CachedRepoTreeNotFoundError:
        pass
    try:
        return frozenset(HfApi().list_repo_files(repository, revision=commit))
    except Exception:  # as in `fetch`
        if not folder.is_dir():
            raise
        return frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def _gguf(snapshot: _Snapshot, hub: HubName) -> str | None:
    """The GGUF file that is meant, None if a model in safetensors is."""
    if hub.file is None:
        return names.only_gguf(snapshot.name, snapshot.files)
    if hub.file not in snapshot.files:
        ggufs = sorted(file for file in snapshot.files if file.lower().endswith(".gguf"))
        raise CheckpointError(
            f"{snapshot.name}: {hub.repository} has no file {hub.file}",
            allowed=f"its GGUF files: {', '.join(ggufs[:6]) or 'there are none'}",
            next_step="name one of them" if ggufs else "pass the repository's own name",
        )
    return hub.file


def _weights(snapshot: _Snapshot) -> list[str]:
    """The weight files that transformers takes, and the index that names them, which is fetched.

    Raises:
        CheckpointError: there are none.
    """
    if SINGLE in snapshot.files:
        return [SINGLE]
    if INDEX in snapshot.files:
        snapshot.fetch([INDEX], [INDEX])
        index = read_json(snapshot.folder / INDEX, snapshot.folder, 'JSON with a "weight_map"')
        shards = index.get("weight_map")
        named = {shard for shard in shards.values() if isinstance(shard, str)} if isinstance(shards, dict) else set()
        return [INDEX, *sorted(shard for shard in named if PurePosixPath(shard).name == shard)]
    others = sorted(filter(names.is_weights, snapshot.files))
    raise CheckpointError(
        f"{snapshot.name} has no {SINGLE} and no {INDEX}" + (f", only {', '.join(others[:3])}" if others else ""),
        allowed="safetensors weights as transformers saves them; pickles (.bin, .pt) can run code",
        next_step="load it with transformers, save it by save_pretrained, and pass that folder"
        if others
        else "check the name; where HF_HUB_OFFLINE is set, unset it: the cache may lack the weights",
    )


def _fetch_code(snapshot: _Snapshot) -> None:
    """Fetch the Python files that configs name, and the files that these import. Nothing is run here."""
    wanted: set[str] = set()
    for config in (names.CONFIG, names.TOKENIZER_CONFIG, *names.PROCESSOR_FILES):
        if snapshot.here(config):
            wanted |= names.code_named(read_json(snapshot.folder / config, snapshot.folder, "a JSON object"))
    wanted &= snapshot.files
    seen: set[str] = set()
    while wanted - seen:
        new = wanted - seen
        snapshot.fetch(new, [])
        seen |= new
        for file in new:
            if file.endswith(".py") and snapshot.here(file):
                check_file(snapshot.folder / file, snapshot.folder)
                wanted |= names.named_by_code(snapshot.folder / file, snapshot.files)
