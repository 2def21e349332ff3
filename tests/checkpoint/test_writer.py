"""Writing a result: shards and their index."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eigenslice.checkpoint.weights import INDEX, SINGLE, SafetensorsWeights
from eigenslice.checkpoint.writer import ShardWriter, check_space, write_json
from eigenslice.errors import ActivationError, IncompleteError
from tests import tiny
from tests.messages import check_message
from tests.results import load

# 16, 24, 8 and 32 bytes in float32
TENSORS = {name: torch.arange(float(size)) for name, size in {"a": 4, "b": 6, "c": 2, "d": 8}.items()}


def write(folder: Path, limit: int, dtype: torch.dtype = torch.float32) -> ShardWriter:
    writer = ShardWriter(folder, {n: tuple(t.shape) for n, t in TENSORS.items()}, dtype, limit)
    writer.begin()
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    return writer


def one(tensor: Tensor, dtype: torch.dtype, folder: Path) -> None:
    """Write a single tensor."""
    writer = ShardWriter(folder, {"a": tuple(tensor.shape)}, dtype, 1000)
    writer.begin()
    writer.add("a", tensor)
    writer.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_fits_is_one_file_without_index(tmp_path: Path) -> None:
    writer = write(tmp_path, 80)
    assert names(tmp_path) == [SINGLE]
    assert writer.total_bytes == 80
    stored = load_file(tmp_path / SINGLE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("limit", "shards"),
    [
        (79, ["abc", "d"]),
        (48, ["abc", "d"]),
        (47, ["ab", "cd"]),
        (40, ["ab", "cd"]),
        (39, ["a", "bc", "d"]),
        (1, ["a", "b", "c", "d"]),
    ],
)
def test_a_file_is_filled_to_the_limit_in_the_order_announced(limit: int, shards: list[str], tmp_path: Path) -> None:
    write(tmp_path, limit)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert names(tmp_path) == sorted([*files, INDEX])
    for file, held in zip(files, shards, strict=True):
        assert sorted(load_file(tmp_path / file)) == list(held)
    index = json.loads((tmp_path / INDEX).read_text())
    expected = {name: file for file, held in zip(files, shards, strict=True) for name in held}
    assert index == {"metadata": {"total_size": 80}, "weight_map": expected}
    weights = SafetensorsWeights(tmp_path)
    assert all(torch.equal(weights.load(name), tensor) for name, tensor in TENSORS.items())


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    model = tiny.CASES["llama"].build()
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    writer = ShardWriter(tmp_path, {n: tuple(t.shape) for n, t in state.items()}, torch.float32, 20_000)
    writer.begin()
    for name, tensor in state.items():
        writer.add(name, tensor)
    writer.finish()
    assert len(names(tmp_path)) > 4
    loaded = load(tmp_path).state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_are_stored_in_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.linspace(0, 1, 7, dtype=torch.float64)
    one(tensor, dtype, tmp_path)
    stored = load_file(tmp_path / SINGLE)["a"]
    assert stored.dtype == dtype
    assert torch.equal(stored, tensor.to(dtype))


def test_views_are_stored_as_they_look(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    one(tensor, torch.float32, tmp_path)
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor)


def test_files_can_be_read_by_others_and_name_their_framework(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(tmp_path, 80)
    assert (tmp_path / SINGLE).stat().st_mode & 0o777 == 0o644
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # older versions of transformers refuse files without


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": (4,)}, torch.float32, 100)
    with pytest.raises(ValueError, match="b is \\(6,\\), announced was None"):
        writer.add("b", TENSORS["b"])


def test_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": (2, 2)}, torch.float32, 100)
    with pytest.raises(ValueError, match="a is \\(4,\\), announced was \\(2, 2\\)"):
        writer.add("a", TENSORS["a"])


def test_in_any_order_and_again_the_files_are_the_same(tmp_path: Path) -> None:
    """An interrupted run writes some tensors twice."""
    folders = [tmp_path / "once", tmp_path / "again"]
    for folder in folders:
        folder.mkdir()
    expected = write(folders[0], 48).finish()
    shapes = {n: tuple(t.shape) for n, t in TENSORS.items()}
    for turn in (["d", "b"], ["b", "c", "a"]):
        writer = ShardWriter(folders[1], shapes, torch.float32, 48)
        writer.begin()
        for name in turn:
            writer.add(name, TENSORS[name])
        if turn[0] == "d":
            written = dict(writer.checksums)
    writer.checksums.update(written)
    assert writer.finish() == expected
    for file in names(folders[0]):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
        digest = hashlib.sha256((folders[1] / file).read_bytes()).hexdigest()
        assert expected.get(file, digest) == digest
    assert list(expected) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("where", [0, 100, -1], ids=["header", "padding", "data"])
def test_a_file_that_is_not_as_it_was_written_is_refused(where: int, tmp_path: Path) -> None:
    writer = write(tmp_path, 80)
    content = bytearray((tmp_path / SINGLE).read_bytes())
    content[where] ^= 1
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(IncompleteError) as caught:
        writer.finish()
    check_message(caught.value, "is not as it was written")


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(IncompleteError) as caught:
        check_space(tmp_path / "not" / "there", 1 << 60)
    check_message(caught.value, str(tmp_path), "MiB free")


def test_what_was_announced_and_never_came_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": (4,), "b": (6,)}, torch.float32, 100)
    writer.begin()
    writer.add("a", TENSORS["a"])
    with pytest.raises(ValueError, match="never written: \\['b'\\]"):
        writer.finish()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ActivationError) as caught:
        one(torch.tensor([1.0, value]), torch.float32, tmp_path)
    check_message(caught.value, "a has NaN or infinite numbers")


def test_what_overflows_in_float16_is_refused_and_fits_into_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError) as caught:
        one(torch.tensor([70_000.0]), torch.float16, tmp_path)
    check_message(caught.value, "a doesn't fit into float16", "6.55e+04")
    assert "--resume --dtype bfloat16" in caught.value.next_step
    one(torch.tensor([70_000.0]), torch.bfloat16, tmp_path)


def test_json_is_written_as_transformers_does(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "größe", "list": [1]})
    expected = '{\n  "name": "größe",\n  "list": [\n    1\n  ]\n}\n'
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == expected


def test_weight_files_of_another_layout_go_and_what_else_is_there_stays(tmp_path: Path) -> None:
    write(tmp_path, 40)
    (tmp_path / "modeling_eigenslice.py").touch()
    write(tmp_path, 80)
    assert names(tmp_path) == [SINGLE, "modeling_eigenslice.py"]


def test_a_file_with_something_behind_its_tensors_is_cut_to_its_size(tmp_path: Path) -> None:
    write(tmp_path, 80)
    with (tmp_path / SINGLE).open("ab") as file:
        file.write(b"x" * 100)
    write(tmp_path, 80)
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], TENSORS["a"])


def test_a_writer_knows_whether_tensors_are_still_as_they_were_written(tmp_path: Path) -> None:
    writer = write(tmp_path, 80)
    checksums = writer.flushed()
    assert sorted(checksums) == sorted(TENSORS)
    assert writer.holds(checksums)
    assert not writer.holds(checksums | {"unknown": 0})
    content = bytearray((tmp_path / SINGLE).read_bytes())
    content[-1] ^= 1
    (tmp_path / SINGLE).write_bytes(content)
    assert not writer.holds(checksums)
    content[-1] ^= 1
    (tmp_path / SINGLE).write_bytes(content[:-1])
    assert not writer.holds(checksums)
