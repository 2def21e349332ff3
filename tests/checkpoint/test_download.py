"""Models from the hub: what is downloaded, what the cache must have, and how a revision is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eigenslice.checkpoint.companions import stage_companions
from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import locate, open_source
from eigenslice.errors import CheckpointError, EigensliceWarning
from tests import tiny, words
from tests.checkpoint.fake_hub import COMMIT, Files, Hub, cache, files_of, serve
from tests.checkpoint.files import copy_of
from tests.checkpoint.gguf_file import write_gguf
from tests.messages import check_message

NAME = "org/name"
UNNEEDED = (
    "consolidated.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.bin",
    "model-Q4_K_M.gguf",
    "training_args.bin",
    "trainer_state.json",
    "modeling_unused.py",
    ".gitattributes",
)
OPTIONAL = ("README.md", "LICENSE", "generation_config.json", "additional_chat_templates/tools.jinja", "USE_POLICY.md")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def folder(dense_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = copy_of(dense_folder("llama"), tmp_path / "model")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def files(folder: Path) -> Files:
    """That Llama's files, with many that others read."""
    others = {name: json.dumps({"of": name}).encode() for name in (*UNNEEDED, *OPTIONAL)}
    return files_of(folder) | others


@pytest.fixture
def needed(folder: Path) -> Files:
    """Config, weights and tokenizer alone."""
    files = files_of(folder)
    del files["generation_config.json"]
    return files


def sharded(folder: Path, target: Path) -> Files:
    """The same model in several files with an index."""
    model = load_model(str(folder), "cpu").model
    model.save_pretrained(target, max_shard_size="20KB")
    words.tokenizer().save_pretrained(target)
    return files_of(target)


def refused(name: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    return caught.value


class TestOnline:
    """The hub answers."""

    def test_only_what_is_needed_is_downloaded_and_once(
        self, files: Files, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = Hub(NAME, files)
        with serve(hub, monkeypatch):
            folder, gguf = locate(NAME)
            assert (folder, gguf) == (root / "models--org--name" / "snapshots" / COMMIT, None)
            assert sorted(hub.given) == sorted([*needed, *OPTIONAL])
            hub.given.clear()
            assert locate(NAME) == (folder, None)
            assert hub.given == []
        assert open_source(NAME).revision == COMMIT  # offline, from what was downloaded

    def test_of_shards_those_that_the_index_names(
        self, folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = sharded(folder, tmp_path / "shards")
        others = {"model-00001-of-00009.safetensors": b"of an older index", "consolidated.safetensors": b""}
        hub = Hub(NAME, files | others)
        with serve(hub, monkeypatch):
            source = open_source(NAME)
        assert len(source.weights.files) > 2
        assert not set(others) & set(hub.given)
        expected = open_source(str(folder)).weights
        for name in expected.names():
            assert torch.equal(source.weights.load(name), expected.load(name))

    def test_one_file_is_taken_where_there_is_an_index_beside_it(
        self, folder: Path, needed: Files, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = Hub(NAME, sharded(folder, tmp_path / "shards") | needed)
        with serve(hub, monkeypatch):
            locate(NAME)
        assert [name for name in hub.given if "safetensors" in name] == ["model.safetensors"]

    @pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "1" * 40])
    def test_a_revision_is_what_is_loaded_and_recorded(
        self, revision: str, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = Hub(NAME, needed)
        hub.revisions = {"main": COMMIT, "v1.0": "1" * 40, "refs/pr/1": "1" * 40}
        with serve(hub, monkeypatch):
            source = open_source(f"{NAME}@{revision}")
        assert source.folder.name == source.revision == "1" * 40
        assert open_source(f"{NAME}@{revision}").revision == "1" * 40  # offline

    def test_a_revision_or_repository_that_is_not_there_is_said(
        self, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serve(Hub(NAME, needed), monkeypatch):
            check_message(refused(f"{NAME}@v9"), f"{NAME}@v9", "RevisionNotFound")
            check_message(refused("org/other"), "org/other", "NotFound")

    def test_a_model_of_pickles_is_refused_and_not_downloaded(
        self, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        del needed["model.safetensors"]
        hub = Hub(NAME, needed | {"pytorch_model.bin": b"pickle"})
        with serve(hub, monkeypatch):
            check_message(refused(NAME), NAME, "pytorch_model.bin")
        assert "pytorch_model.bin" not in hub.given

    def test_an_adapter_alone_is_said_to_be_one(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"x"}
        with serve(Hub(NAME, adapter), monkeypatch):
            assert "adapter" in refused(NAME).found

    def test_code_that_a_config_names_is_fetched_with_what_it_imports_and_names(
        self, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = json.loads(needed["tokenizer_config.json"]) | {"auto_map": {"AutoTokenizer": [None, "own.T"]}}
        code = {
            "own.py": b"from .helpers import x\nFILES = {'vocab_file': \"own.vocab\"}",
            "helpers.py": b"from . import own",
            "own.vocab": b"a",
            "other.vocab": b"b",
            "other.py": b"",
        }
        hub = Hub(NAME, needed | code | {"tokenizer_config.json": json.dumps(config).encode()})
        with serve(hub, monkeypatch):
            locate(NAME)
        assert set(code) & set(hub.given) == {"own.py", "helpers.py", "own.vocab"}

    def test_the_licence_that_the_card_links_to_is_fetched_and_copied(
        self, needed: Files, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        card = b"---\nlicense: other\nlicense_link: legal/TERMS\n---\n"
        hub = Hub(NAME, needed | {"README.md": card, "legal/TERMS": b"terms", "legal/OTHER": b""})
        with serve(hub, monkeypatch):
            stage_companions(open_source(NAME), tmp_path / "out")
        assert "legal/OTHER" not in hub.given
        assert (tmp_path / "out" / "legal" / "TERMS").read_text() == "terms"


class TestGguf:
    """Repositories of GGUF files."""

    @pytest.fixture
    def gguf(self, tmp_path: Path) -> bytes:
        return write_gguf(tiny.CASES["llama"].build(), tmp_path / "tiny.gguf").read_bytes()

    @pytest.mark.parametrize("extra", [{}, {"config.json": b"{}", "mmproj-F16.gguf": b"x", "README.md": b""}])
    @pytest.mark.parametrize("name", ["tiny-Q8_0.gguf", "TINY.GGUF"])
    def test_the_only_one_is_the_model(
        self, name: str, extra: Files, gguf: bytes, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = Hub(NAME, {name: gguf} | extra)
        with serve(hub, monkeypatch):
            source = open_source(NAME)
        assert source.gguf == name
        assert hub.given == [name]
        assert source.revision == COMMIT

    def test_of_several_one_has_to_be_named(self, gguf: bytes, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = Hub(NAME, {"a-Q4.gguf": b"x", "b-Q8.gguf": b"y", "F16/c.gguf": gguf})
        with serve(hub, monkeypatch):
            error = refused(f"{NAME}@main")
            check_message(error, "a-Q4.gguf", "b-Q8.gguf", "F16/c.gguf")
            assert f"{NAME}/F16/c.gguf@main" in error.next_step
            assert hub.given == []
            folder, file = locate(f"{NAME}/F16/c.gguf@main")
            check_message(refused(f"{NAME}/F16/d.gguf"), "F16/d.gguf")
        assert (folder / str(file)).read_bytes() == gguf
        assert hub.given == ["F16/c.gguf"]
        assert locate(f"{NAME}/F16/c.gguf") == (folder, file)  # offline


class TestOffline:
    """The cache alone."""

    def test_config_weights_and_tokenizer_are_enough(self, needed: Files, root: Path) -> None:
        snapshot = cache(root, NAME, needed)
        assert locate(NAME) == (snapshot, None)
        source = open_source(NAME)
        assert source.revision == COMMIT
        assert source.tokenizer("w7")["input_ids"] == [7]

    @pytest.mark.parametrize("listed", [False, True])
    def test_and_no_more_where_the_hub_said_what_there_is(
        self, listed: bool, files: Files, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshot = cache(root, NAME, needed)
        if listed:
            self._list(root, files, monkeypatch)
            with pytest.warns(EigensliceWarning, match="LICENSE, README.md"):
                assert locate(NAME) == (snapshot, None)
        else:
            assert locate(NAME) == (snapshot, None)

    @staticmethod
    def _list(root: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave the list of a repository's files, as the hub's client does, which downloads one of them."""
        from huggingface_hub import snapshot_download

        with serve(Hub(NAME, files), monkeypatch):
            snapshot_download(NAME, allow_patterns=["config.json"])

    @pytest.mark.parametrize("listed", [False, True])
    @pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
    def test_config_and_weights_are_required(
        self, lacking: str, listed: bool, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if listed:
            self._list(root, needed, monkeypatch)
            pointer = root / "models--org--name" / "snapshots" / COMMIT / lacking
            pointer.unlink(missing_ok=True)
        cache_files = {name: content for name, content in needed.items() if name != lacking and name != "config.json"}
        if lacking != "config.json" and not listed:
            cache_files["config.json"] = needed["config.json"]
        cache(root, NAME, cache_files)
        check_message(refused(NAME), lacking)

    @pytest.mark.parametrize("lacking", ["model.safetensors.index.json", "model-00002"])
    def test_index_and_shards_are_required(self, lacking: str, folder: Path, root: Path, tmp_path: Path) -> None:
        files = sharded(folder, tmp_path / "shards")
        gone = next(name for name in files if name.startswith(lacking))
        cache(root, NAME, {name: content for name, content in files.items() if name != gone})
        check_message(refused(NAME), gone)

    def test_a_tokenizer_that_is_known_to_be_there_is_required(
        self, needed: Files, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._list(root, needed, monkeypatch)
        without = {name: content for name, content in needed.items() if name not in ("tokenizer.json", "config.json")}
        cache(root, NAME, without)
        check_message(refused(NAME), "tokenizer.json")

    def test_a_revision_that_is_not_cached_is_refused(self, needed: Files, root: Path) -> None:
        cache(root, NAME, needed)
        check_message(refused(f"{NAME}@v2"), f"{NAME}@v2")
        assert locate(f"{NAME}@{COMMIT}")[0].name == COMMIT

    def test_a_folder_with_an_at_sign_is_a_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder.parent / "org").mkdir()
        folder.rename(folder.parent / "org" / "name@main")
        monkeypatch.chdir(folder.parent)
        assert locate("org/name@main") == (Path("org/name@main"), None)
        assert open_source("org/name@main").revision is None

    @pytest.mark.parametrize("name", ["org/name@", "org/name@../x", "org/name@a..b", "org/name@a b", "@main"])
    def test_a_name_with_an_impossible_revision_is_no_hub_id(self, name: str, root: Path) -> None:
        check_message(refused(name), name, "no hub id")
