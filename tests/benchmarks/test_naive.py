"""The naive ways to make a model smaller, against models that are really built at the smaller size."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import naive
from tests import tiny

KEPT = torch.tensor(sorted({*range(32)} - {0, 3, 9, 10, 17, 24, 30, 31}))


def narrow(case: str, dense: Any) -> Any:
    """The model that transformers builds at the width of KEPT, with the dense weights of these channels."""
    variant = tiny.CASES[case]
    config = copy.deepcopy(variant.config | variant.extra) | {"hidden_size": len(KEPT)}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(variant.model_type, **config)).eval()
    cut = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            for axis, size in enumerate(cut[name].shape):
                if size != parameter.shape[axis]:
                    parameter = parameter.index_select(axis, KEPT)
            cut[name].copy_(parameter)
        buffers = dict(dense.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model


@pytest.mark.parametrize("case", ["llama-head-dim", "qwen3-tied", "cohere", "nemotron", "qwen3_moe", "deepseek_v3"])
def test_channels_are_cut_as_in_a_narrower_model(case: str) -> None:
    dense, ids = tiny.CASES[case].build(), tiny.random_ids(4, 40)
    reference = narrow(case, dense)
    with torch.no_grad():
        actual, expected = naive.with_channels(dense, KEPT)(ids).logits, reference(ids).logits
    assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))
    channels = naive.Channels.of(dense, ids)
    assert sum(channels.sizes(len(KEPT)).values()) == naive.stored(reference)
    assert naive.block_parameters(dense, channels.sizes(len(KEPT))) == naive.block_parameters(reference)


@pytest.mark.parametrize(
    ("case", "others"), [("gpt2", set()), ("olmo2", {"q_norm", "q_proj.bias"}), ("phi", {"q_proj.bias"})]
)
def test_vectors_as_long_as_the_stream_is_wide_are_not_cut(case: str, others: set[str]) -> None:
    """gpt2's norms and positions, olmo2's norms behind sublayers: all parameters but those inside of the attention."""
    variant = tiny.CASES[case]
    config = copy.deepcopy(variant.config | variant.extra) | ({"num_key_value_heads": 4} if case != "gpt2" else {})
    dense = tiny.tiny_model(variant.model_type, config)
    axes = naive.Channels.of(dense, tiny.random_ids(4, 40)).axes
    left = {name for name, p in dense.named_parameters() if 32 in p.shape and name not in axes}
    assert {
        next((end for end in others if end in name), name) for name in left if "k_" not in name and "v_" not in name
    } == others


def test_the_channels_of_small_weights_go_first() -> None:
    dense = tiny.CASES["qwen3_moe"].build()
    axes = naive.Channels.of(dense, tiny.random_ids(4, 40)).axes
    gone = torch.tensor([1, 8, 20])
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name in axes:
                parameter.index_copy_(axes[name], gone, 0.1 * parameter.index_select(axes[name], gone))
    channels = naive.Channels.of(dense, tiny.random_ids(4, 40))
    assert set(range(32)) - set(channels.largest(29).tolist()) == {1, 8, 20}
    assert channels.width_for(naive.stored(dense)) == 32
    most = sum(channels.sizes(29).values())
    assert (channels.width_for(most), channels.width_for(most - 1)) == (29, 28)


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "gpt2", "falcon", "qwen3_next", "deepseek_v3"])
def test_a_block_that_does_nothing_can_go(case: str) -> None:
    dense, ids = tiny.CASES[case].build(), tiny.random_ids(2, 20)
    owner, name = naive.blocks(dense)
    before = copy.deepcopy(getattr(owner, name)[1])

    class Nothing(type(before)):
        def forward(self, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
            output = super().forward(hidden_states, *arguments, **options)
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    getattr(owner, name)[1].__class__ = Nothing
    with torch.no_grad():
        expected = dense(ids, use_cache=False).logits
        smaller = naive.without_blocks(dense, {1})
        assert torch.allclose(smaller(ids, use_cache=False).logits, expected, atol=1e-6)
        assert not torch.allclose(naive.without_blocks(dense, {0})(ids, use_cache=False).logits, expected, atol=1e-2)
    size = sum(parameter.numel() for parameter in before.parameters())
    assert naive.stored(smaller) == naive.stored(dense) - size
    assert naive.block_parameters(smaller) == naive.block_parameters(dense) - size
    assert len(getattr(owner, name)) == 3, "the dense model is as it was"


def test_which_blocks_go() -> None:
    assert naive.late(6, 2) == {3, 4}
    assert naive.even(6, 1) == {3}
    assert naive.even(6, 2) == {2, 4}
    assert naive.even(10, 4) == {2, 4, 6, 8}
    assert all(len(choose(6, count)) == count for choose in (naive.late, naive.even) for count in range(1, 6))
    dense = tiny.CASES["llama"].build()
    block = naive.block_parameters(dense) // 3
    assert naive.nearest_blocks(dense, naive.stored(dense) - int(1.4 * block), naive.late) == {1}
    assert naive.nearest_blocks(dense, naive.stored(dense) - int(1.6 * block), naive.late) == {0, 1}
    assert naive.nearest_blocks(dense, naive.stored(dense), naive.late) == {1}, "at least one block"
