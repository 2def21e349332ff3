"""Writing a result: shards, the index, and a folder that appears complete or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eigenslice.checkpoint.weights import INDEX, SINGLE, SafetensorsWeights
from eigenslice.checkpoint.writer import ShardWriter, check_output, output_folder, write_json
from eigenslice.errors import OutputError
from tests import tiny
from tests.conftest import load
from tests.messages import check_message

# 16, 24, 8 and 32 bytes in float32
TENSORS = {name: torch.arange(float(size)) for name, size in {"a": 4, "b": 6, "c": 2, "d": 8}.items()}


def write(folder: Path, limit: int, dtype: torch.dtype = torch.float32) -> ShardWriter:
    writer = ShardWriter(folder, {n: tuple(t.shape) for n, t in TENSORS.items()}, dtype, limit)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    return writer


def one(tensor: Tensor, dtype: torch.dtype, folder: Path) -> None:
    """Write a single tensor."""
    writer = ShardWriter(folder, {"a": tuple(tensor.shape)}, dtype, 1000)
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
def test_a_file_is_filled_to_the_limit_in_the_order_of_writing(limit: int, shards: list[str], tmp_path: Path) -> None:
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


def test_the_same_tensor_twice_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": (4,)}, torch.float32, 100)
    writer.add("a", TENSORS["a"])
    with pytest.raises(ValueError, match="announced was None"):
        writer.add("a", TENSORS["a"])


def test_what_was_announced_and_never_came_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": (4,), "b": (6,)}, torch.float32, 100)
    writer.add("a", TENSORS["a"])
    with pytest.raises(ValueError, match="never written: \\['b'\\]"):
        writer.finish()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        one(torch.tensor([1.0, value]), torch.float32, tmp_path)
    check_message(caught.value, "a doesn't fit into float32", "NaN or infinite")


def test_what_overflows_in_float16_is_refused_and_fits_into_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        one(torch.tensor([70_000.0]), torch.float16, tmp_path)
    check_message(caught.value, "a doesn't fit into float16")
    assert "bfloat16" in caught.value.next_step
    one(torch.tensor([70_000.0]), torch.bfloat16, tmp_path)


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep" / "out"
    with output_folder(output) as folder:
        (folder / "file").write_text("content")
        assert not output.exists()
        assert folder.parent == output.parent
        assert folder.name.startswith(".")
    assert names(output.parent) == ["out"]
    assert (output / "file").read_text() == "content"
    assert output.stat().st_mode & 0o777 == 0o755


def test_a_relative_output_is_written_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with output_folder(Path("deep/out")) as folder:
        (folder / "file").touch()
    assert (tmp_path / "deep" / "out" / "file").exists()


def fail_after(output: Path, made: str, error: BaseException) -> None:
    """Make a file in the temporary folder and one beside it, and then fail."""
    with output_folder(output) as folder:
        (folder / "file").write_text("content")
        if made:
            (folder.parent / made).touch()
        raise error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_exception_leaves_nothing_behind_and_passes_through(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught:
        fail_after(tmp_path / "new" / "deep" / "out", "", error)
    assert caught.value is error
    assert names(tmp_path) == []


def test_folders_that_were_there_or_hold_something_stay(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError):
        fail_after(tmp_path / "old" / "new" / "out", "of-somebody-else", RuntimeError())
    assert names(tmp_path / "old") == ["new"]
    assert names(tmp_path / "old" / "new") == ["of-somebody-else"]


def test_an_operating_systems_error_is_an_output_error_with_its_reason(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "new" / "out"):
        raise full
    check_message(caught.value, str(tmp_path / "new" / "out"), "No space left on device")
    assert caught.value.__cause__ is full
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_an_output_that_exists_is_refused_and_left_alone(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / "out"):
        pytest.fail("the body must not run")
    check_message(caught.value, str(tmp_path / "out"), "exists already")
    assert names(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputError) as caught, output_folder(output):
        output.mkdir()
    check_message(caught.value, "exists already")
    assert names(tmp_path) == ["out"]
    assert names(output) == []


@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_an_output_below_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "file" / below)
    check_message(caught.value, str(tmp_path / "file"), "is not a folder")


@pytest.mark.parametrize("name", ["x" * 300, f"new/{'x' * 300}"], ids=["here", "in-a-new-folder"])
def test_a_name_that_the_file_system_refuses_is_an_output_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, output_folder(tmp_path / name):
        pytest.fail("the body must not run")
    check_message(caught.value)
    assert names(tmp_path) == []


def test_a_name_as_long_as_the_file_system_takes_works(tmp_path: Path) -> None:
    """The temporary folder's may then be no longer."""
    with output_folder(tmp_path / ("x" * 255)) as folder:
        (folder / "file").touch()
    assert names(tmp_path) == ["x" * 255]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_a_parent_that_can_not_be_written_to_is_an_output_error() -> None:
    with pytest.raises(OutputError) as caught, output_folder(Path("/proc/eigenslice/out")):
        pytest.fail("the body must not run")
    check_message(caught.value, "/proc/eigenslice/out")


def test_json_is_written_as_transformers_does(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "größe", "list": [1]})
    expected = '{\n  "name": "größe",\n  "list": [\n    1\n  ]\n}\n'
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == expected
