"""Configs, indexes and headers of safetensors and GGUF with anything in them: taken, or refused by one message."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eigenslice.checkpoint.source import open_source
from eigenslice.checkpoint.weights import INDEX, SINGLE
from eigenslice.errors import EigensliceError
from eigenslice.model.dense import DenseModel
from tests import tiny
from tests.checkpoint.files import copy_of
from tests.checkpoint.gguf_file import write_gguf
from tests.messages import check_message

FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(
    st.integers(-3, 100),
    st.sampled_from([2**31, 2**32, 2**63, -(2**63), 10**9, 10**40]),
    st.floats(allow_nan=True),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)
FIELDS = sorted(json.loads(tiny.CASES["llama"].build().config.to_json_string(use_diff=False)))


def opens(name: Path) -> None:
    """Every reader's first steps: taken, or one message."""
    try:
        DenseModel(open_source(str(name)))
    except EigensliceError as error:
        check_message(error)


@pytest.fixture(scope="module")
def folder(dense_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(dense_folder("llama"), tmp_path_factory.mktemp("fuzz") / "model")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny.CASES["llama"].build(), tmp_path_factory.mktemp("fuzz") / "tiny.gguf")


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_configs(changes: dict[str, Any], folder: Path) -> None:
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    opens(folder)
    path.write_text(before)


@FUZZ
@given(content=st.one_of(VALUES, st.fixed_dictionaries({"metadata": VALUES, "weight_map": VALUES})))
def test_indexes(content: Any, folder: Path) -> None:
    (folder / SINGLE).rename(folder / "one.safetensors")
    names = sorted(load_file(folder / "one.safetensors"))
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        content["weight_map"] = dict.fromkeys(names, "one.safetensors") | content["weight_map"]
    (folder / INDEX).write_text(json.dumps(content))
    opens(folder)
    (folder / INDEX).unlink()
    (folder / "one.safetensors").rename(folder / SINGLE)


def changed(data: bytes, header: int, edits: list[tuple[float, int | bytes]]) -> bytes:
    """Bytes overwritten in a header: at a share of its length, by a 64-bit number or by bytes."""
    content = bytearray(data)
    for share, value in edits:
        new = struct.pack("<Q", value) if isinstance(value, int) else value
        at = int(share * header)
        content[at : at + len(new)] = new
    return bytes(content)


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, allow_nan=False),
        st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])),
    ),
    min_size=1,
    max_size=3,
)


@FUZZ
@given(edits=EDITS)
def test_safetensors_headers(edits: list[tuple[float, int | bytes]], folder: Path) -> None:
    before = (folder / SINGLE).read_bytes()
    length = 8 + struct.unpack("<Q", before[:8])[0]
    (folder / SINGLE).write_bytes(changed(before, length, edits))
    opens(folder)
    (folder / SINGLE).write_bytes(before)


@settings(FUZZ, max_examples=150)
@given(edits=EDITS)
def test_gguf_headers(edits: list[tuple[float, int | bytes]], gguf: Path) -> None:
    before = gguf.read_bytes()
    length = before.index(b"blk.2.ffn_down.weight") + 60
    gguf.write_bytes(changed(before, length, edits))
    opens(gguf)
    gguf.write_bytes(before)
