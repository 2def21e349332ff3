"""Opening a checkpoint: folders, files and hub ids, and what is said of those that can't be sliced."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from eigenslice.checkpoint.source import locate, open_source
from eigenslice.checkpoint.weights import SINGLE
from eigenslice.errors import CheckpointError, UnsupportedModelError
from tests import tiny, words
from tests.checkpoint.files import copy_of, edit_json
from tests.checkpoint.gguf_file import write_gguf
from tests.conftest import Slicer
from tests.messages import check_message


@pytest.fixture
def folder(dense_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama, to break."""
    return copy_of(dense_folder("llama"), tmp_path / "model")


def refused(name: Path | str, kind: type[Any] = CheckpointError) -> Any:
    with pytest.raises(kind) as caught:
        open_source(str(name))
    return caught.value


def test_a_folder_opens(folder: Path) -> None:
    source = open_source(str(folder))
    assert (source.name, source.folder, source.gguf) == (str(folder), folder, None)
    assert source.config.model_type == "llama"
    assert source.config.hidden_size == 32
    assert "model.embed_tokens.weight" in source.weights.names()


def test_opening_reads_headers_and_no_weights(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-4] + b"\xff\xff\xff\xff")  # NaN in the last tensor
    assert open_source(str(folder)).weights.names()
    (folder / SINGLE).write_bytes(b"garbage")
    check_message(refused(folder), SINGLE, "not a readable safetensors file")


def test_a_relative_path_and_a_home_folder_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_source(folder.name).folder.resolve() == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source(f"~/{folder.name}").folder == folder


def test_hashes_are_those_of_config_and_weights(folder: Path) -> None:
    (folder / "notes.txt").write_text("no part of the model")
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", SINGLE)}
    assert open_source(str(folder)).hashes == expected


def test_the_tokenizer_is_loaded(folder: Path) -> None:
    words.tokenizer().save_pretrained(folder)
    source = open_source(str(folder))
    assert source.tokenizer("w7 w9")["input_ids"] == [7, 9]


def test_a_missing_tokenizer_is_a_checkpoint_error_that_offers_token_ids(folder: Path) -> None:
    source = open_source(str(folder))
    with pytest.raises(CheckpointError) as caught:
        _ = source.tokenizer
    check_message(caught.value, str(folder), "has no tokenizer")
    assert "token ids" in caught.value.allowed


def test_a_broken_tokenizer_is_a_checkpoint_error(folder: Path) -> None:
    words.tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        _ = open_source(str(folder)).tokenizer
    check_message(caught.value, str(folder), "no tokenizer that transformers can load")


def test_the_generation_config_is_the_checkpoints(folder: Path) -> None:
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(folder)
    generation = open_source(str(folder)).generation_config
    assert generation is not None
    assert generation.temperature == 0.25


def test_a_checkpoint_may_be_without_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert open_source(str(folder)).generation_config is None


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    check_message(refused(folder), str(folder), "has no config.json")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"3", b'"llama"', b"null", b'{"hidden_size": 32}', b"\xff\xfe\x00"],
    ids=["no-json", "list", "number", "string", "null", "no-model-type", "no-text"],
)
def test_a_config_that_is_none_is_refused(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    error = refused(folder)
    check_message(error, str(folder / "config.json"), "can't be read")
    assert "model_type" in error.allowed


@pytest.mark.parametrize("model_type", [["llama"], None, 3], ids=repr)
def test_a_model_type_that_is_no_name_is_refused(model_type: Any, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        open_source(str(folder))
    check_message(caught.value)


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"num_attention_heads": 6}, {"rms_norm_eps": []}], ids=repr
)
def test_a_config_that_transformers_refuses_is_refused_with_its_reason(values: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "config.json", **values)
    check_message(refused(folder), str(folder / "config.json"), "transformers can't read the config")


def test_an_unknown_architecture_is_refused_by_name(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="t5")
    error = refused(folder, UnsupportedModelError)
    check_message(error, "'t5'")
    assert "docs/support.md" in error.allowed


def test_an_unsliceable_variant_is_refused_with_the_reason(dense_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(dense_folder("opt"), tmp_path / "model")
    edit_json(folder / "config.json", do_layer_norm_before=False)
    check_message(refused(folder, UnsupportedModelError), "'opt'", "do_layer_norm_before=false")


@pytest.mark.parametrize(
    ("quantization", "method"),
    [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({"bits": 4}, "'unknown'"), ("mine", "'unknown'")],
)
def test_a_quantized_checkpoint_is_refused_by_its_method(quantization: Any, method: str, folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config=quantization)
    error = refused(folder)
    check_message(error, str(folder), "quantized", method)
    assert "unquantized" in error.next_step


@pytest.mark.parametrize("basis", ["global", "per-block"])
def test_a_sliced_model_in_the_custom_class_is_refused(basis: str, run_slice: Slicer) -> None:
    output = run_slice("opt", width=24, basis=basis).output
    check_message(refused(output, UnsupportedModelError), str(output), "sliced model already")


def test_a_file_that_is_no_gguf_is_refused(folder: Path) -> None:
    check_message(refused(folder / "config.json"), "config.json", "neither a folder nor a .gguf file")


def test_a_file_that_is_gguf_by_name_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then garbage")
    check_message(refused(tmp_path / "model.gguf"), "model.gguf")


def test_a_hub_id_is_asked_for_and_its_absence_told() -> None:
    error = refused("nobody/nothing-of-this-name")
    check_message(error, "nobody/nothing-of-this-name", "the hub didn't give it")
    assert "network" in error.next_step


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "./nothing"])
def test_a_path_that_does_not_exist_and_is_no_hub_id_is_refused(name: str) -> None:
    check_message(refused(name), name, "doesn't exist and is no hub id")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    check_message(refused("x" * 300))


def test_locating_tells_folders_from_ggufs(folder: Path, tmp_path: Path) -> None:
    write_gguf(tiny.CASES["llama"].build(), tmp_path / "model.gguf")
    copy_of(folder, tmp_path / "folder.gguf")
    assert locate(str(folder)) == (folder, None)
    assert locate(str(tmp_path / "model.gguf")) == (tmp_path, "model.gguf")
    assert locate(str(tmp_path / "folder.gguf")) == (tmp_path / "folder.gguf", None)


def test_a_hub_id_is_read_from_the_hubs_local_cache(
    dense_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub client's own layout: a commit's snapshot folder and the branch that points to it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(dense_folder("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = open_source("someone/tiny")
    assert source.folder == repository / "snapshots" / commit
    name = "model.norm.weight"
    assert torch.equal(source.weights.load(name), open_source(str(dense_folder("llama"))).weights.load(name))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"], ids=repr)
def test_a_broken_generation_config_is_a_checkpoint_error(content: bytes, folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(content)
    source = open_source(str(folder))
    with pytest.raises(CheckpointError) as caught:
        _ = source.generation_config
    check_message(caught.value, "generation_config.json")


def test_a_tokenizer_that_panics_is_a_checkpoint_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers' Rust code ends in an exception that is no `Exception`."""

    class PanicException(BaseException):
        pass

    def panic(*arguments: Any, **options: Any) -> None:
        raise PanicException("x")

    words.tokenizer().save_pretrained(folder)
    source = open_source(str(folder))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(CheckpointError) as caught:
        _ = source.tokenizer
    check_message(caught.value, "PanicException: x")
