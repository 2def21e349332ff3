"""What transformers takes from a header that was read once is what the package gguf reads."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from eigenslice.checkpoint import gguf_header
from eigenslice.checkpoint.gguf_reader import PACKAGE_READER, HeaderReader, headers_read_once
from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import open_source
from eigenslice.model.dense import DenseModel
from tests import tiny
from tests.checkpoint.gguf_file import write_gguf

STORED = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0")]


@pytest.fixture
def model() -> Any:
    return tiny.CASES["llama"].build()


@pytest.mark.parametrize("stored", STORED, ids=lambda kind: kind.name)
def test_config_tokenizer_and_tensors(stored: gguf.GGMLQuantizationType, model: Any, tmp_path: Path) -> None:
    path = str(write_gguf(model, tmp_path / "model.gguf", stored))
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    with headers_read_once():
        found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    assert gguf.GGUFReader is PACKAGE_READER
    tensors, others = found.pop("tensors"), expected.pop("tensors")
    assert expected.pop("ignore").keys() == {"version", "tensor_count", "kv_count"}
    assert not found.pop("ignore")
    assert found == expected
    assert len(found["tokenizer"]["tokens"]) == tiny.VOCABULARY
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in others)


def test_the_package_s_reader_is_back_whichever_use_ends_first() -> None:
    first, second = headers_read_once(), headers_read_once()
    first.__enter__()
    second.__enter__()
    assert gguf.GGUFReader is HeaderReader
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gguf.GGUFReader is PACKAGE_READER


def test_a_file_s_header_is_read_once_until_the_file_changes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, count = write_gguf(model, tmp_path / "model.gguf"), gguf_header._Reader.header, [0]

    def counted(reader: gguf_header._Reader) -> gguf_header.GgufHeader:
        count[0] += 1
        return read(reader)

    monkeypatch.setattr(gguf_header._Reader, "header", counted)
    monkeypatch.delattr(gguf.GGUFReader, "_get_field_parts")  # it isn't used
    source = open_source(str(path))
    assert DenseModel(source).anatomy.width == tiny.WIDTH
    assert source.tokenizer
    assert load_model(str(path), "cpu").tokenizer()
    assert count[0] == 1
    write_gguf(tiny.tiny_model("llama", tiny.LLAMA | {"num_hidden_layers": 2}), path)
    assert open_source(str(path)).config.num_hidden_layers == 2
