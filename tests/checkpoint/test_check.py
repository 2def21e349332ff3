"""The same verdict on each hostile folder or file by who reads checkpoints itself, and who does by transformers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import locate, open_source
from eigenslice.checkpoint.weights import INDEX, SINGLE
from eigenslice.errors import CheckpointError, EigensliceError
from eigenslice.evaluation.costs import weight_bytes_on_disk
from eigenslice.model.dense import DenseModel
from tests import tiny, words
from tests.attacks import hostile
from tests.checkpoint.files import copy_of, edit_json, weight_of
from tests.checkpoint.gguf_file import NORMAL, write_gguf
from tests.messages import check_message
from tests.results import load

READERS: dict[str, Callable[[str], Any]] = {
    "slice": lambda name: DenseModel(open_source(name)),
    "eval": lambda name: load_model(name, "cpu"),
}


@pytest.fixture
def folder(dense_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama with a tokenizer, to break."""
    folder = copy_of(dense_folder("llama"), tmp_path / "model")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A tiny Llama's GGUF."""
    return write_gguf(tiny.CASES["llama"].build(), tmp_path / "tiny.gguf")


def verdicts(name: Path | str) -> dict[str, str | None]:
    """What each reader says, None where it takes the folder."""
    said: dict[str, str | None] = {}
    for reader, read in READERS.items():
        try:
            read(str(name))
            said[reader] = None
        except EigensliceError as error:
            check_message(error)
            said[reader] = error.found
    return said


def test_what_is_not_attacked_is_taken_by_all(folder: Path) -> None:
    assert verdicts(folder) == dict.fromkeys(READERS)


@pytest.mark.parametrize("attack", hostile.FOLDERS)
def test_all_readers_refuse(attack: str, folder: Path) -> None:
    hostile.FOLDERS[attack](folder)
    assert all(verdicts(folder).values()), verdicts(folder)
    assert not (folder.parent / hostile.BOOM).exists(), "code was run"


@pytest.mark.parametrize("attack", hostile.GGUFS)
def test_all_readers_refuse_a_gguf(attack: str, gguf: Path) -> None:
    before = gguf.read_bytes()
    gguf.write_bytes(hostile.GGUFS[attack](before))
    assert gguf.read_bytes() != before
    assert all(verdicts(gguf).values()), verdicts(gguf)


def refused(read: Callable[[], Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read()
    return caught.value


def agree(name: Path | str, expected: dict[str, torch.Tensor]) -> None:
    """All readers read these weights."""
    dense, model = DenseModel(open_source(str(name))), load_model(str(name), "cpu").model
    for tensor, value in expected.items():
        assert torch.equal(weight_of(dense, tensor), value.double()), tensor
        assert torch.equal(model.state_dict()[tensor], value), tensor


def test_shards_are_taken(folder: Path) -> None:
    expected = load_file(folder / SINGLE)
    hostile.shard(folder)
    agree(folder, expected)


def test_of_a_single_file_and_an_index_without_its_shards_the_file_is_taken(folder: Path) -> None:
    """As transformers does. Saving a small model over a large one leaves such a folder."""
    expected = load_file(folder / SINGLE)
    hostile.shard(folder, single=True)
    for file in ("a.safetensors", "b.safetensors"):
        (folder / file).unlink()
    agree(folder, expected)


def test_an_index_of_the_single_file_is_taken(folder: Path) -> None:
    expected = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(expected, SINGLE)}))
    agree(folder, expected)


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    expected = load_file(folder / SINGLE)
    (folder / "sub").mkdir()
    for name in (SINGLE, "config.json"):
        (folder / name).rename(folder / "sub" / name)
        (folder / name).symlink_to(Path("sub") / name)
    agree(folder, expected)
    (folder.parent / "alias").symlink_to(folder)
    agree(folder.parent / "alias", expected)


@pytest.mark.parametrize("shared", [False, True], ids=["of-the-repository", "of-the-cache"])
def test_links_into_a_hub_cache_are_followed(shared: bool, folder: Path, tmp_path: Path) -> None:
    """The hub client's layout: a snapshot's names are links to blobs, and these to blobs that repositories share."""
    expected = load_file(folder / SINGLE)
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "models--a--b" / "blobs" / f"{number:040x}"
        if shared:
            (tmp_path / "blobs" / "00").mkdir(parents=True, exist_ok=True)
            shutil.move(file, tmp_path / "blobs" / "00" / f"{number:064x}")
            blob.symlink_to(Path("../../blobs/00") / f"{number:064x}")
        else:
            shutil.move(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    agree(snapshot, expected)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("/etc/passwd")
    assert all(verdicts(snapshot).values())


def test_buffers_of_older_versions_are_passed_over(folder: Path) -> None:
    expected = load_file(folder / SINGLE)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), torch.inf)}
    save_file(expected | old, folder / SINGLE, metadata={"format": "pt"})
    agree(folder, expected)
    open_source(str(folder)).check_finite()


def test_code_is_not_run_and_not_fetched(folder: Path) -> None:
    """Both readers take transformers' own class."""
    expected = load_file(folder / SINGLE)
    (folder / "code.py").write_text(f"open({str(folder.parent / hostile.BOOM)!r}, 'w')")
    for place in ("code.Model", "someone/else--code.Model"):
        edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": place, "AutoConfig": place})
        agree(folder, expected)
    assert not (folder.parent / hostile.BOOM).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json", "."])
def test_closed_files_are_told(name: str, folder: Path) -> None:
    (folder / name).chmod(0)
    said = verdicts(folder)
    (folder / name).chmod(0o700)
    assert all(said.values())


def test_an_adapter_is_applied_as_transformers_does_it_or_refused(folder: Path) -> None:
    ids = tiny.random_ids(2, 9)
    with torch.no_grad():
        bare = load(folder)(ids).logits
        hostile.adapter(folder)
        expected = load(folder)(ids).logits
        actual = load_model(str(folder), "cpu").model(ids).logits
        half = load_model(str(folder), "cpu", torch.bfloat16).model
        assert torch.equal(half(ids).logits, load(folder, dtype=torch.bfloat16)(ids).logits)
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, bare, atol=1e-2)
    check_message(refused(lambda: open_source(str(folder))), "adapter", "merge it first")
    sizes = [(folder / name).stat().st_size for name in (SINGLE, "adapter_model.safetensors")]
    assert weight_bytes_on_disk(str(folder)) == sum(sizes)


def test_weights_that_lack_beside_an_adapter_are_found(folder: Path) -> None:
    """transformers forgets them where there is an adapter, and fills them with random numbers."""
    hostile.adapter(folder)
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    error = refused(lambda: load_model(str(folder), "cpu"))
    check_message(error, "lacks 1 tensors", "model.layers.1.mlp.up_proj.weight")


def test_a_gguf_is_taken_by_all(gguf: Path) -> None:
    model = tiny.CASES["llama"].build()
    agree(gguf, model.state_dict())


def test_capitals_and_a_folder_with_one_gguf_are_taken(gguf: Path) -> None:
    gguf.rename(gguf.with_suffix(".GGUF"))
    assert locate(str(gguf.with_suffix(".GGUF"))) == (gguf.parent, "tiny.GGUF")
    assert locate(str(gguf.parent)) == (gguf.parent, "tiny.GGUF")
    agree(gguf.parent, tiny.CASES["llama"].build().state_dict())


def test_of_several_ggufs_one_has_to_be_named(gguf: Path) -> None:
    shutil.copy(gguf, gguf.with_name("other.gguf"))
    for said in verdicts(gguf.parent).values():
        assert said is not None
        assert "2 GGUF files: other.gguf, tiny.gguf" in said


def test_parts_of_a_gguf_are_refused(gguf: Path) -> None:
    part = gguf.rename(gguf.with_name("tiny-00001-of-00002.gguf"))
    assert all("one of 2 parts" in (said or "") for said in verdicts(part).values())


def test_a_gguf_is_read_apart_from_its_neighbours(
    gguf: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads a file of the same name in the working directory, and tokenizers and adapters beside it."""
    hostile.adapter(folder)
    shutil.move(gguf, folder / "tiny.gguf")
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_gguf(tiny.CASES["llama-tied"].build(), other / "tiny.gguf")
    monkeypatch.chdir(other)
    agree(folder / "tiny.gguf", tiny.CASES["llama"].build().state_dict())
    loaded = load_model(str(folder / "tiny.gguf"), "cpu")
    assert not hasattr(loaded.model, "peft_config")
    assert loaded.tokenizer()("ab")["input_ids"] == [4 + NORMAL.index("ab")]


def test_a_gguf_beside_a_config_without_weights_is_named(gguf: Path, folder: Path) -> None:
    (folder / SINGLE).unlink()
    shutil.move(gguf, folder / "tiny.gguf")
    error = refused(lambda: locate(str(folder)))
    check_message(error, "tiny.gguf")
    assert str(folder / "tiny.gguf") in error.next_step
