"""A Hugging Face hub: as a cache on the disk, and as a server that records which files it gave."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    """The files of a checkpoint."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def cache(root: Path, repository: str, files: Files, revision: str = "main", commit: str = COMMIT) -> Path:
    """Write a cache as the hub's client does: names in a snapshot are links to blobs; gives the snapshot's folder."""
    place = root / ("models--" + repository.replace("/", "--"))
    snapshot = place / "snapshots" / commit
    for name, content in files.items():
        blob = place / "blobs" / hashlib.sha1(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        pointer = snapshot / name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    ref = place / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot


class Hub:
    """A server with one repository.

    Attributes:
        files: What the repository holds.
        revisions: Commits by branch or tag; each has the same files.
        given: Names of the files that were downloaded.
    """

    def __init__(self, repository: str, files: Files) -> None:
        self.repository, self.files = repository, files
        self.revisions = {"main": COMMIT}
        self.given: list[str] = []
        self.requests = 0

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for a path."""
        self.requests += 1
        place, _, _ = path.partition("?")
        api, files = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if place.startswith(files):
            revision, _, name = place.removeprefix(files).partition("/")
            content = self.files.get(name)
            if content is None:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": revision}
        if place.startswith(f"{api}/tree/"):
            return self._json([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.files.items()])
        if place == api or place.startswith(f"{api}/revision/"):
            revision = place.removeprefix(api).removeprefix("/revision/") or "main"
            revision = revision.replace("%2F", "/")
            if revision not in self.revisions:
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            return self._json({"id": self.repository, "sha": self.revisions[revision], "siblings": []})
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    @staticmethod
    def _json(content: Any) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


@contextmanager
def serve(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the hub's client ask this hub."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: bool) -> None:
            status, content, headers = hub.answer(self.path)
            if body and status == 200 and "/resolve/" in self.path:
                hub.given.append(self.path.partition("/resolve/")[2].partition("/")[2])
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield
    finally:
        monkeypatch.setattr(constants + "HF_HUB_OFFLINE", True)
        server.shutdown()
        server.server_close()
