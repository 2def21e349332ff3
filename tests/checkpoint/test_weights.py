"""Reading safetensors: what is written comes back, and a broken checkpoint says what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eigenslice.checkpoint.weights import INDEX, SINGLE, SafetensorsWeights
from eigenslice.errors import CheckpointError
from tests.messages import check_message

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(0.25, dtype=torch.float16),
    "d": torch.tensor([[1 / 3]], dtype=torch.float64),
}


def single(folder: Path) -> Path:
    save_file(TENSORS, folder / SINGLE)
    return folder


def sharded(folder: Path, **index: str) -> Path:
    """Two shards; keywords change the index."""
    save_file({name: TENSORS[name] for name in "ab"}, folder / "one.safetensors")
    save_file({name: TENSORS[name] for name in "cd"}, folder / "two.safetensors")
    weight_map = dict.fromkeys("ab", "one.safetensors") | dict.fromkeys("cd", "two.safetensors") | index
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsWeights(folder)
    return caught.value


@pytest.mark.parametrize("write", [single, sharded])
def test_what_is_written_is_read_back(write, tmp_path: Path) -> None:
    weights = SafetensorsWeights(write(tmp_path))
    assert sorted(weights.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
        loaded = weights.load(name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


def test_the_files_are_those_that_hold_weights(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"not looked at")
    assert SafetensorsWeights(sharded(tmp_path)).files == (
        tmp_path / "one.safetensors",
        tmp_path / "two.safetensors",
    )


def test_a_single_file_beside_an_index_and_its_shards_is_refused(tmp_path: Path) -> None:
    """transformers takes the single file, which an older save may have left behind."""
    save_file({"stale": torch.ones(1)}, tmp_path / SINGLE)
    check_message(refused(sharded(tmp_path)), "holds weights twice", "one.safetensors")


def test_of_an_index_without_its_shards_and_a_single_file_the_file_is_taken(tmp_path: Path) -> None:
    """As transformers does."""
    for shard in ("one.safetensors", "two.safetensors"):
        (sharded(tmp_path) / shard).unlink()
    (tmp_path / "one.safetensors").unlink()
    save_file({"new": torch.ones(1)}, tmp_path / SINGLE)
    assert SafetensorsWeights(tmp_path).names() == ["new"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_integers_and_8_bit_floats_have_no_dtype_that_can_be_sliced(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2).to(dtype)}, tmp_path / SINGLE)
    assert SafetensorsWeights(tmp_path).dtype("a") is None


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    check_message(refused(tmp_path), str(tmp_path), f"no {SINGLE}", INDEX)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    error = refused(tmp_path)
    check_message(error, "only pytorch_model.bin", "pickles can run code")
    assert "save_pretrained" in error.next_step


@pytest.mark.parametrize("size", [0, 4, 60, -1], ids=["empty", "no-header", "in-header", "in-data"])
def test_a_truncated_file_is_refused_by_name(size: int, tmp_path: Path) -> None:
    file = single(tmp_path) / SINGLE
    file.write_bytes(file.read_bytes()[:size])
    check_message(refused(tmp_path), str(file), "not a readable safetensors file")


@pytest.mark.parametrize(
    "content",
    [b"\x80\x04garbage" * 100, (2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
    ids=["garbage", "header-of-2^60-bytes", "header-is-no-object"],
)
def test_a_file_that_is_no_safetensors_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    check_message(refused(tmp_path), str(tmp_path / SINGLE), "not a readable safetensors file")


def test_a_broken_shard_is_refused_by_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"garbage")
    check_message(refused(tmp_path), "two.safetensors", "not a readable safetensors file")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    error = refused(tmp_path)
    check_message(error, "lacks 1 of the 2 weight files", "two.safetensors")
    assert "one.safetensors" not in error.found


@pytest.mark.parametrize("shard", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", "..", "."], ids=repr)
def test_an_index_that_leaves_its_folder_is_refused(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(1)}, place / "x.safetensors")  # it exists, so that only its place is wrong
    check_message(refused(sharded(folder, a=shard)), str(folder))
    if "/" in shard:
        check_message(refused(folder), "points outside of its folder", shard)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    check_message(refused(sharded(tmp_path, e="two.safetensors")), "two.safetensors", "lacks tensor 'e'")


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    check_message(refused(sharded(tmp_path, a="two.safetensors")), "two.safetensors", "lacks tensor 'a'")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"3",
        b'{"weight_map": 3}',
        b'{"weight_map": null}',
        b'{"metadata": {}}',
        b'{"weight_map": {"a": "one.safetensors"}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
    ids=["no-json", "list", "number", "map-is-number", "map-is-null", "no-map", "no-metadata", "no-text", "deep"],
)
def test_an_index_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_bytes(content)
    error = refused(tmp_path)
    check_message(error, str(tmp_path / INDEX), "is not a shard index")
    assert "weight_map" in error.allowed
