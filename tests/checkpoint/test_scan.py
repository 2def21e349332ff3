"""One pass over weight files: the hash, and every number that isn't finite, wherever it is."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from eigenslice.checkpoint import scan
from eigenslice.checkpoint.source import open_source
from eigenslice.checkpoint.weights import SINGLE
from eigenslice.errors import CheckpointError
from eigenslice.runtime.progress import no_progress
from tests import tiny
from tests.attacks.hostile import shard
from tests.checkpoint.files import copy_of, rewrite
from tests.checkpoint.gguf_file import write_gguf
from tests.messages import check_message


@pytest.fixture(params=[scan.PIECE, 8], ids=["whole", "in-pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read at once, or two float32 numbers at a time."""
    monkeypatch.setattr(scan, "PIECE", request.param)


@pytest.fixture
def folder(dense_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return copy_of(dense_folder("llama"), tmp_path / "model")


def refused(name: Path, dtype: torch.dtype | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_source(str(name)).check_finite(dtype)
    return caught.value


@pytest.mark.usefixtures("pieces")
def test_finite_weights_pass_and_are_hashed(folder: Path) -> None:
    shard(folder)
    source = open_source(str(folder))
    source.check_finite()
    for name in ("a.safetensors", "b.safetensors", "config.json"):
        assert source.hashes[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.embed_tokens.weight", (95, 31)),
        ("lm_head.weight", (0, 0)),
        ("model.layers.1.input_layernorm.weight", (7,)),
    ],
)
def test_the_first_broken_number_is_named(
    tensor: str, place: tuple[int, ...], dtype: torch.dtype, value: float, folder: Path
) -> None:
    """Used by the calibration text or not."""

    def change(tensors: dict[str, Any]) -> None:
        tensors |= {name: t.to(dtype) for name, t in tensors.items()}
        tensors[tensor][place] = value

    rewrite(folder, change)
    check_message(refused(folder), tensor, f"the first one at {list(place)}")


def test_numbers_that_a_dtype_can_not_hold_are_named(folder: Path) -> None:
    rewrite(folder, lambda t: t["lm_head.weight"].mul_(0).add_(1e5))
    open_source(str(folder)).check_finite(torch.bfloat16)
    check_message(refused(folder, torch.float16), "lm_head.weight", "1e+05", "float16")


@pytest.mark.parametrize(("kind", "nan"), [("F32", "0000c07f"), ("F16", "007e"), ("Q8_0", "007e")])
@pytest.mark.usefixtures("pieces")
def test_ggufs_are_dequantized(kind: str, nan: str, tmp_path: Path) -> None:
    """A block of Q8_0 begins with its scale, a float16."""
    model = tiny.CASES["llama"].build()
    path = write_gguf(model, tmp_path / "tiny.gguf", GGMLQuantizationType[kind])
    source = open_source(str(path))
    source.check_finite()
    assert source.hashes == {"tiny.gguf": hashlib.sha256(path.read_bytes()).hexdigest()}
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    at = int(tensor.data_offset) + 3 * int(tensor.n_bytes) // 56
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes.fromhex(nan) + content[at + len(nan) // 2 :])
    check_message(refused(path), "blk.1.ffn_up.weight", "[3, 0]")


def test_hashing_beside_other_work_scans_too(folder: Path) -> None:
    """The thread keeps what it finds: the files aren't read again."""
    rewrite(folder, lambda t: t["model.norm.weight"].fill_(torch.nan))
    source = open_source(str(folder))
    source.start_hashing()(no_progress)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        source.check_finite()
