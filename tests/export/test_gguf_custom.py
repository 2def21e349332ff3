"""llama.cpp computes from the file of a result of eigenslice's class what that class computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from eigenslice.errors import OptionsError, UnsupportedModelError
from eigenslice.export.gguf.llama_cpp import LlamaCpp
from tests import tiny
from tests.conftest import Slicer
from tests.export import models
from tests.export.conftest import Exporter, Sliced
from tests.export.models import log_probabilities
from tests.messages import check_message
from tests.results import load


def fields(path: Path) -> dict[str, Any]:
    """What a GGUF's header says."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def require_equal(folder: Path, gguf: Path) -> None:
    """All tokens at all positions."""
    model = load(folder)
    assert model.config.model_type == "eigenslice"
    ids = tiny.random_ids(1, 24, seed=9)
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
    assert (log_probabilities(gguf, ids[0].tolist()) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "case",
    [*(case for case in models.CASES if case != "qwen3"), *models.PHI3, "seed_oss", "ernie4_5-biased"],
)
def test_a_number_of_neurons_for_each_block(case: str, sliced: Sliced, exported: Exporter) -> None:
    """Counts that no block of numbers divides; heads x head_dim isn't the hidden width."""
    folder = sliced(case, neurons=[37, 64])
    result = exported(folder, check=False)
    header = fields(result.output)
    assert header["general.architecture"] == "deci"
    assert header["deci.feed_forward_length"] == [37, 64]
    assert header["deci.attention.head_count"] == [4, 4]
    assert header["deci.attention.head_count_kv"] == [2, 2]
    assert header["deci.embedding_length"] == 32
    require_equal(folder, result.output)


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2", "llama"),
        ("qwen3", "qwen3"),
        ("phi3", "llama"),
        ("seed_oss", "llama"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_one_number_of_neurons_takes_the_types_own_architecture(
    case: str, arch: str, tied: bool, sliced: Sliced, exported: Exporter
) -> None:
    folder = sliced(case, form="custom", tie_word_embeddings=tied)
    result = exported(folder, check=False)
    header = fields(result.output)
    assert header["general.architecture"] == arch
    assert header[f"{arch}.feed_forward_length"] == 64
    require_equal(folder, result.output)


@pytest.mark.parametrize(("neurons", "arch"), [([40, 64], "deci"), (None, "llama")])
def test_fewer_heads_than_the_dense_model(
    neurons: list[int] | None, arch: str, sliced: Sliced, exported: Exporter
) -> None:
    folder = sliced(neurons=neurons, heads=1, form="custom")
    result = exported(folder)
    header = fields(result.output)
    each = header[f"{arch}.attention.head_count_kv"]
    assert each == ([1, 1] if arch == "deci" else 1)
    require_equal(folder, result.output)


@pytest.mark.parametrize("tied", [False, True])
def test_norms_without_a_gain_have_ones(tied: bool, sliced: Sliced, exported: Exporter) -> None:
    """With tied embeddings the last one has the class's gain. Epsilon is the class's."""
    folder = sliced(neurons=[37, 64], tie_word_embeddings=tied, rms_norm_eps=3e-4)
    result = exported(folder)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(result.output).tensors}
    norms = {name: values for name, values in tensors.items() if "norm" in name}
    assert set(norms) == {"output_norm.weight", *(f"blk.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attn", "ffn"))}
    last = norms.pop("output_norm.weight")
    assert all(bool((values == 1).all()) and len(values) == 32 for values in norms.values())
    gain = load(folder).model.model.norm.weight
    assert torch.equal(last, gain.detach() if tied else torch.ones(32))
    assert ("output.weight" in tensors) is not tied
    assert fields(result.output)["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-4)


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types_are_checked_and_counted(type_: str, sliced: Sliced, exported: Exporter) -> None:
    """o_proj has rows of 48 numbers, one down_proj rows of 40, which blocks of 32 don't hold; the other has 64."""
    result = exported(sliced(neurons=[40, 64]), type_)
    others = {} if type_.endswith("f16") else {"f16": 3}
    outer = 2 if type_ in ("q8_0", "f16", "bf16") else 0
    assert result.formats == {type_: 2 * 7 + outer - sum(others.values())} | others | ({} if outer else {"q8_0": 2})
    tensors = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(result.output).tensors}
    assert tensors["blk.0.ffn_down.weight"] == ("f16" if others else type_)
    assert tensors["blk.1.ffn_down.weight"] == type_


def test_k_quants(sliced: Sliced, exported: Exporter) -> None:
    """Rows of 256 numbers; o_proj's 288 and a down_proj's 64 take the next larger type, 40 float16."""
    folder = sliced(width=256, hidden_size=288, intermediate_size=256, neurons=[256, 64, 40], num_hidden_layers=3)
    result = exported(folder, "q4_k")
    assert result.formats == {"q6_k": 2, "q4_k": 3 * 5 + 1, "q5_0": 3 + 1, "f16": 1}


def test_an_impossible_type_is_refused(sliced: Sliced, exported: Exporter, tmp_path: Path) -> None:
    with pytest.raises(OptionsError) as caught:
        exported(sliced(width=40, neurons=[32, 64]), "q8_0")
    check_message(caught.value, "--type q8_0 holds rows of 32 numbers; the model's hidden width 40")
    assert not list(tmp_path.glob("*.gguf"))


def test_llama_cpp_gives_the_tokens(sliced: Sliced, exported: Exporter) -> None:
    """What ends a text is in the dense config, which lies in that of the class."""
    result = exported(sliced(neurons=[40, 64], eos_token_id=[2, 5]))
    header = fields(result.output)
    assert (header["tokenizer.ggml.eos_token_id"], header["tokenizer.ggml.eot_token_id"]) == (2, 5)
    with LlamaCpp(result.output) as runtime:
        assert runtime.tokenize("then in") == models.tokenizer()("then in")["input_ids"]


@pytest.mark.parametrize(
    ("case", "text", "found"),
    [
        ("qwen3", "width: 24\nneurons: [40, 8, 56]", "'deci' lacks a part of this 'qwen3' model: norms of queries"),
        ("mistral-window", "width: 24\nneurons: [40, 8, 56]", "a sliding window of 6 tokens"),
        ("phi", "width: 24\nneurons: [40, 8, 56]", "saved as 'eigenslice' of a 'phi' model"),
        ("opt", "width: 24", "saved as 'eigenslice' of a 'opt' model"),
        ("llama", "per-block", "matrices between the bases of its blocks (--basis per-block)"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_what_llama_cpp_does_not_run_is_refused(
    case: str, text: str, found: str, check: bool, run_slice: Slicer, exported: Exporter, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    size: dict[str, Any] = {"width": 24, "basis": "per-block"} if text == "per-block" else {"recipe": recipe}
    folder = run_slice(case, **size).output
    with pytest.raises(UnsupportedModelError) as caught:
        exported(folder, check=check)
    check_message(caught.value, found)
    assert ("--form stock" in caught.value.next_step) is (case in ("qwen3", "llama"))
    assert not list(tmp_path.glob("*.gguf"))
