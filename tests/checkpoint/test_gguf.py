"""A GGUF file opens as the model that it was written from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoTokenizer

from eigenslice.checkpoint.source import open_source
from eigenslice.errors import CheckpointError
from eigenslice.model.dense import DenseModel
from tests import tiny
from tests.checkpoint.files import weight_of
from tests.checkpoint.gguf_file import NORMAL, write_gguf
from tests.conftest import Slicer
from tests.messages import check_message
from tests.results import load


@pytest.fixture(params=["llama", "llama-tied"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.CASES[request.param].build()


@pytest.fixture
def llama() -> Any:
    return tiny.CASES["llama"].build()


def opened(path: Path) -> DenseModel:
    return DenseModel(open_source(str(path)))


def test_config_and_weights_are_the_models(model: Any, tmp_path: Path) -> None:
    dense = opened(write_gguf(model, tmp_path / "tiny.gguf"))
    for field in ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(dense.config, field) == getattr(model.config, field)
    assert dense.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)
    assert dense.anatomy.tied == model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(weight_of(dense, name), tensor.double()), name


def test_half_precision_is_read_as_stored(llama: Any, tmp_path: Path) -> None:
    dense = opened(write_gguf(llama, tmp_path / "tiny.gguf", GGMLQuantizationType.F16))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(weight_of(dense, name), llama.state_dict()[name].half().double())


def test_quantized_weights_are_dequantized(llama: Any, tmp_path: Path) -> None:
    """Q8_0 is whole numbers up to 127 times a scale: half a step off, and a bit for a float16 scale."""
    dense = opened(write_gguf(llama, tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = llama.state_dict()[name].double()
    error = (weight_of(dense, name) - expected).abs()
    assert (error <= 0.6 * expected.abs().amax(-1, keepdim=True) / 127).all()
    assert error.max() > 0


def test_the_tokenizer_and_the_generation_config_are_the_files(llama: Any, tmp_path: Path) -> None:
    source = open_source(str(write_gguf(llama, tmp_path / "tiny.gguf")))
    tokens = [4 + NORMAL.index(piece) for piece in ("ab", "c", "!")]
    assert source.tokenizer("abc!")["input_ids"] == tokens
    assert source.generation_config is not None
    assert source.generation_config.eos_token_id == 2


def test_only_the_file_is_hashed(llama: Any, tmp_path: Path) -> None:
    source = open_source(str(write_gguf(llama, tmp_path / "tiny.gguf")))
    assert list(source.hashes) == ["tiny.gguf"]


def test_a_sliced_gguf_is_a_checkpoint_as_any_other(llama: Any, run_slice: Slicer, tmp_path: Path) -> None:
    """transformers marks what it dequantized as quantized, and then refuses to load or save it."""
    path = write_gguf(llama, tmp_path / "tiny.gguf")
    output = run_slice("llama", model=str(path), width=tiny.WIDTH).output
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(output)("abc!")["input_ids"] == [95, 70, 4]
    ids = tiny.random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(load(output)(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 5000], ids=["by-a-byte", "by-thousands"])
def test_a_truncated_file_is_refused(cut: int, llama: Any, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    check_message(caught.value, "tiny.gguf")


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(llama: Any, tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    path = write_gguf(llama, tmp_path / "tiny.gguf", omit="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    check_message(caught.value, "tiny.gguf", "lacks")
