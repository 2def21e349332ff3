"""llama.cpp computes from the file what transformers computes from the folder."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig

from eigenslice.errors import ExportError, OptionsError, OutputError, UnsupportedModelError
from eigenslice.export.agreement import TEXTS
from eigenslice.export.gguf import tensors as gguf_tensors
from eigenslice.export.gguf.arch import architecture_of
from eigenslice.export.gguf.llama_cpp import LlamaCpp
from eigenslice.export.gguf.rope import interleave
from tests import tiny
from tests.conftest import Slicer
from tests.export import models
from tests.export.conftest import Exporter, Sliced
from tests.export.models import log_probabilities
from tests.messages import check_message
from tests.results import load

IRREGULAR = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

PROMPT, NEW = tiny.random_ids(1, 8, seed=3)[0], 12
"""A prompt, and the number of tokens that follow."""


def check_probabilities(folder: Path, exported: Exporter) -> None:
    """llama.cpp predicts what transformers does: all tokens at all positions."""
    result = exported(folder, check=False)
    ids = tiny.random_ids(1, 24, seed=9)
    expected = models.expected_log_probabilities(folder, ids)
    actual = log_probabilities(result.output, ids[0].tolist())
    representable = expected > -85  # llama.cpp takes the logarithm of a probability, in float32
    assert representable.float().mean() > 0.7
    assert (actual - expected)[representable].abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", models.CASES | models.STOCK)
def test_sliced_models_give_the_same_probabilities(case: str, sliced: Sliced, exported: Exporter) -> None:
    """heads x head_dim isn't the hidden width wherever llama.cpp doesn't insist on it."""
    check_probabilities(sliced(case), exported)


@pytest.mark.parametrize("case", models.WHOLE)
def test_models_of_the_whole_width_give_the_same_probabilities(case: str, sliced: Sliced, exported: Exporter) -> None:
    """Fewer neurons and heads, behind windows shorter than the text."""
    folder = sliced(case, width=48, neurons=[40] * 5, heads=1)
    assert load(folder).config.num_key_value_heads == 1
    check_probabilities(folder, exported)


@pytest.mark.parametrize(
    ("case", "type_", "formats"),
    [
        ("mixtral", "q4_0", {"q4_0": 2 * 6, "q8_0": 2, "f16": 2, "f32": 2}),
        ("mixtral", "bf16", {"bf16": 2 * 7 + 2, "f32": 2}),
        ("phi3-rope-long", "q8_0", {"q8_0": 2 * 6 + 2, "f16": 2}),
        ("granite-tied", "f16", {"f16": 2 * 7 + 1}),
    ],
)
def test_types_of_stacked_and_fused_matrices(
    case: str, type_: str, formats: dict[str, int], sliced: Sliced, exported: Exporter
) -> None:
    """Experts are one matrix, what chooses them stays float32, and rounding is by rows of what is written."""
    assert exported(sliced(case), type_).formats == formats


def test_k_quants_of_experts(sliced: Sliced, exported: Exporter) -> None:
    folder = sliced("mixtral", width=256, hidden_size=288, intermediate_size=256, num_local_experts=2)
    assert exported(folder, "q4_k").formats == {"q6_k": 2, "q4_k": 2 * 6, "f16": 2, "f32": 2}


@pytest.mark.parametrize(
    ("case", "size", "config"),
    [
        ("qwen2_moe", {"width": 24, "heads": 1}, {"head_dim": 12}),
        ("starcoder2", {"width": 32, "neurons": [40, 40]}, {"hidden_size": 32}),
        ("phi", {"width": 32, "neurons": [40, 40]}, {"hidden_size": 32}),
    ],
)
def test_what_runs_at_one_width_only_can_be_cut_elsewhere(
    case: str, size: dict[str, Any], config: dict[str, Any], sliced: Sliced, exported: Exporter
) -> None:
    """Heads that fit the width, or neurons."""
    exported(sliced(case, **size, **config))


@pytest.mark.parametrize(("case", "neurons"), [("qwen3_moe", 16), ("mixtral", 40)])
def test_experts_with_fewer_neurons(case: str, neurons: int, sliced: Sliced, exported: Exporter) -> None:
    """The file is compared with transformers there."""
    result = exported(sliced(case, neurons=[neurons] * 2))
    shapes = {tensor.name: tensor.shape.tolist() for tensor in GGUFReader(result.output).tensors}
    assert shapes["blk.1.ffn_down_exps.weight"][:2] == [neurons, 32]


@pytest.mark.parametrize(("case", "experts", "neurons"), [("qwen3_moe", 3, 16), ("mixtral", 10, 40)])
def test_fewer_experts_write_the_same_text(
    case: str, experts: int, neurons: int, sliced: Sliced, exported: Exporter
) -> None:
    """Fewer experts with fewer neurons: transformers' kernel by default, its plain one and llama.cpp agree, greedily,
    token by token. The file is compared with transformers, too."""
    folder = sliced(case, width=48, experts=experts, neurons=[neurons] * 2)
    result = exported(folder)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in GGUFReader(result.output).tensors}
    assert shapes["blk.1.ffn_down_exps.weight"] == [neurons, 48, experts]
    assert shapes["blk.1.ffn_gate_inp.weight"][1] == experts
    default, plain = load(folder), load(folder, experts_implementation="eager")
    assert default.config.model_type == case
    assert default.config._experts_implementation not in (None, "eager")
    texts = [greedy(default), greedy(plain)]
    with LlamaCpp(result.output, exact=True) as runtime:
        ids = PROMPT.tolist()
        for _ in range(NEW):
            ids.append(next(iter(runtime.next_tokens(ids, 1))))
    assert texts == [ids, ids]


def greedy(model: Any) -> list[int]:
    """Tokens of the prompt and the most likely ones after it, by transformers, without an end."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return model.generate(PROMPT[None], attention_mask=torch.ones_like(PROMPT[None]), **options)[0].tolist()


def test_a_tied_head_is_stored_once(sliced: Sliced, exported: Exporter) -> None:
    tied = exported(sliced("llama-tied"))
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(tied.output).tensors}
    assert tied.formats == {"f32": 2 * 7 + 1}


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types_are_checked_and_counted(type_: str, sliced: Sliced, exported: Exporter) -> None:
    """Widths of 32; o_proj has rows of 48 numbers, which blocks of 32 don't hold."""
    result = exported(sliced(), type_)
    others = {} if type_.endswith("f16") else {"f16": 2}
    outer = 2 if type_ in ("q8_0", "f16", "bf16") else 0
    assert result.formats == {type_: 2 * 7 + outer - sum(others.values())} | others | ({} if outer else {"q8_0": 2})
    assert result.agreement is not None
    assert result.unrounded is not None
    assert result.agreement.mean_difference <= result.unrounded.mean_difference
    tensors = {tensor.name: tensor for tensor in GGUFReader(result.output).tensors}
    assert tensors["blk.1.attn_q.weight"].tensor_type.name.lower() == type_
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_k_quants(sliced: Sliced, exported: Exporter) -> None:
    """Rows of 256 numbers; o_proj's 288 and down_proj's 64 take the next larger type that holds them."""
    result = exported(sliced(width=256, hidden_size=288), "q4_k")
    assert result.formats == {"q6_k": 2, "q4_k": 2 * 5, "q5_0": 2 * 2}


def test_an_impossible_type_is_refused(sliced: Sliced, exported: Exporter, tmp_path: Path) -> None:
    folder = sliced(width=40)
    with pytest.raises(OptionsError) as caught:
        exported(folder, "q8_0")
    check_message(caught.value, "--type q8_0 holds rows of 32 numbers; the model's hidden width 40")
    assert "f32, f16, bf16" in caught.value.allowed
    assert "q4_0" not in caught.value.allowed
    assert "--width 32" in caught.value.next_step
    with pytest.raises(OptionsError):
        exported(folder, "q3_x")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("neurons", [None, [40, 64]], ids=["stock", "custom class"])
def test_a_wrong_file_is_refused_and_removed(
    neurons: list[int] | None, sliced: Sliced, exported: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of query and key in transformers' order: a file that llama.cpp loads without complaint."""
    folder = sliced(neurons=neurons)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(gguf_tensors, "interleave", lambda rows, heads, turned: rows)
    with pytest.raises(ExportError) as caught:
        exported(folder)
    check_message(caught.value, "llama.cpp disagrees with transformers")
    assert set(tmp_path.rglob("*")) == before


def test_a_wrong_split_is_refused(sliced: Sliced, exported: Exporter) -> None:
    with pytest.raises(ExportError) as caught:
        exported(sliced(split="smollm"), tokenizer_pre="gpt-2")
    check_message(caught.value, "the runtime's tokenizer gives")


@pytest.mark.parametrize("split", ["gpt-2", "smollm", *models.SPLITS])
def test_tokens_and_special_tokens(split: str, sliced: Sliced, exported: Exporter) -> None:
    folder = sliced(split=split)
    result = exported(folder)
    fields = {name: field.contents() for name, field in GGUFReader(result.output).fields.items()}
    assert fields["tokenizer.ggml.pre"] == split
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == models.tokenizer().chat_template
    with LlamaCpp(result.output) as runtime:
        for text in (*TEXTS, "in 1212 the<s>then"):
            assert runtime.tokenize(text) == models.tokenizer(split)(text)["input_ids"]


def test_an_existing_file_is_kept(sliced: Sliced, exported: Exporter, tmp_path: Path) -> None:
    (tmp_path / "f32.gguf").write_text("mine")
    with pytest.raises(OutputError):
        exported(sliced())
    assert (tmp_path / "f32.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("case", "width", "found"),
    [
        ("qwen2-window", 24, "llama.cpp refuses 'qwen2' at hidden width 24, other than heads x head_dim = 32"),
        ("mistral-window", 24, "a sliding window of 6 tokens"),
        ("qwen2_moe", 24, "llama.cpp refuses 'qwen2_moe' at hidden width 24, other than heads x head_dim = 48"),
        ("starcoder2", 24, "llama.cpp refuses 'starcoder2' at hidden width 24"),
        ("phi", 24, "llama.cpp refuses 'phi' at hidden width 24"),
        ("smollm3", 24, "rotary angles in other layers than three of each four"),
        ("nemotron", 24, "llama.cpp can't run results saved as 'nemotron'"),
        ("opt", 24, "llama.cpp can't run results saved as 'eigenslice'"),
    ],
)
def test_what_llama_cpp_does_not_run_is_refused(
    case: str, width: int, found: str, run_slice: Slicer, exported: Exporter, tmp_path: Path
) -> None:
    folder = run_slice(case, width=width).output
    with pytest.raises(UnsupportedModelError) as caught:
        exported(folder)
    check_message(caught.value, found)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    ("model_type", "values", "found"),
    [
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type 'dynamic'",
        ),
        ("llama", {"rope_parameters": tiny.ROPE | {"partial_rotary_factor": 0.5}}, "heads that are rotated in part"),
        ("qwen3", {"rope_parameters": models.LLAMA3}, "rotary angles of type 'llama3'"),
        ("phi3", {"sliding_window": 63}, "a sliding window of 63 tokens"),
        ("gemma", {"tie_word_embeddings": False}, "a head that isn't the embedding"),
        ("gemma", {"tie_word_embeddings": True, "hidden_act": "relu"}, "the activation 'relu'"),
        ("qwen3_moe", models.EXPERTS | {"norm_topk_prob": False}, "weights of experts whose sum isn't one"),
        ("qwen3_moe", models.EXPERTS | {"mlp_only_layers": [1]}, "blocks without experts"),
        ("qwen3_moe", models.EXPERTS | {"decoder_sparse_step": 2}, "blocks without experts"),
        ("qwen2_moe", models.QWEN2_MOE | {"norm_topk_prob": True}, "weights of experts whose sum is one"),
        ("qwen2_moe", models.QWEN2_MOE | {"tie_word_embeddings": True}, "a head that is the embedding"),
        ("mixtral", {"sliding_window": 6}, "a sliding window of 6 tokens"),
        ("starcoder2", {"use_bias": False}, "linear layers without a bias"),
        ("gemma3_text", models.GEMMA3 | {"layer_types": IRREGULAR}, "other layers than all but each n-th"),
        ("gemma3_text", models.GEMMA3 | {"layer_types": ["full_attention"] * 5}, "other layers than all but each n-th"),
        ("gemma3_text", models.GEMMA3 | {"query_pre_attn_scalar": 16}, "scaled by another number"),
        ("gemma3_text", models.GEMMA3 | {"final_logit_softcapping": 3.0}, "capped logits"),
        ("gemma3_text", models.GEMMA3 | {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("smollm3", {"rope_parameters": models.LLAMA3}, "rotary angles of type 'llama3'"),
    ],
)
def test_other_variants_are_refused(model_type: str, values: dict[str, Any], found: str) -> None:
    config = AutoConfig.for_model(model_type, **copy.deepcopy(tiny.LLAMA | values))
    with pytest.raises(UnsupportedModelError) as caught:
        architecture_of(config)
    check_message(caught.value, found)


@pytest.mark.parametrize("case", ["gemma", "qwen3_moe", "smollm3", "arcee"])
def test_biases_without_a_place_are_refused(case: str, exported: Exporter, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "dense", case, attention_bias=True)
    with pytest.raises(UnsupportedModelError) as caught:
        exported(folder, check=False)
    check_message(caught.value, "has no place for the tensor model.layers.0.self_attn.o_proj.bias")
    assert not list(tmp_path.glob("*.gguf"))


def test_numbers_that_are_not_turned_stay_behind() -> None:
    assert interleave(torch.arange(12), 2, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


def test_interleaving_puts_what_an_angle_turns_side_by_side() -> None:
    rows = torch.arange(12)  # two heads of six: (0, 3), (1, 4), (2, 5) are turned together
    assert interleave(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
