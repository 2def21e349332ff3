"""Ids in the files that name tokens by ids."""

import pytest

from eigenslice.errors import UnsupportedModelError
from eigenslice.vocabulary.rewriting import (
    ids_of_steps,
    named_ids,
    renumber,
    renumbering,
    rewrite_tokenizer,
    rewrite_tokenizer_config,
)
from eigenslice.vocabulary.specification import read_specification

KEPT = [0, 2, 5, 9]
IDS = {0: 0, 2: 1, 5: 2, 9: 3}


def test_new_ids_are_dense_and_in_the_old_order() -> None:
    assert renumbering(reversed(KEPT)) == IDS


def test_every_kind_of_field_that_names_tokens() -> None:
    content = {
        "bos_token_id": 2,
        "eos_token_id": [9, 5],
        "pad_token_id": -1,
        "decoder_start_token_id": None,
        "suppress_tokens": [5, 6],
        "begin_suppress_tokens": [6, 7],
        "bad_words_ids": [[5, 9], [5, 6]],
        "force_words_ids": [[5], [[2, 9], [3]]],
        "sequence_bias": [[[5, 9], 1.5], [[6], 2.0]],
        "forced_decoder_ids": [[1, 9], [2, 7]],
        "unk_token_id": 7,
        "text_config": {"eos_token_id": 9, "hidden_size": 5},
        "num_hidden_layers": 9,
        "layer_types": ["full_attention"],
        "max_length": 2,
    }
    assert renumber(content, IDS) == {
        "bos_token_id": 1,
        "eos_token_id": [3, 2],
        "pad_token_id": -1,
        "decoder_start_token_id": None,
        "suppress_tokens": [2],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[2, 3]],
        "force_words_ids": [[2], [[1, 3]]],
        "sequence_bias": [[[2, 3], 1.5]],
        "forced_decoder_ids": [[1, 3]],
        "unk_token_id": None,
        "text_config": {"eos_token_id": 3, "hidden_size": 5},
        "num_hidden_layers": 9,
        "layer_types": ["full_attention"],
        "max_length": 2,
    }
    assert named_ids(content) == {2, 9, 5, 7}


def test_added_tokens_in_the_tokenizer_config() -> None:
    content = {
        "added_tokens_decoder": {"9": {"content": "<a>"}, "2": {"content": "<b>"}, "3": {"content": "<c>"}},
        "chat_template": "{{ 9 }}",
        "model_max_length": 9,
    }
    assert rewrite_tokenizer_config(content, IDS) == {
        "added_tokens_decoder": {"1": {"content": "<b>"}, "3": {"content": "<a>"}},
        "chat_template": "{{ 9 }}",
        "model_max_length": 9,
    }
    assert rewrite_tokenizer_config({"bos_token": "<b>"}, IDS) == {"bos_token": "<b>"}


def content(**more: object) -> dict:
    words = ["a", "b", "ab", "c", "abc", "<s>"]
    return {
        "added_tokens": [{"id": 5, "content": "<s>", "special": True}, {"id": 6, "content": "<pad>", "special": True}],
        "model": {
            "type": "BPE",
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": ["a b", ["ab", "c"]],
        },
    } | more


def test_ids_in_all_steps_of_a_tokenizer() -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
    }
    roberta = {"type": "RobertaProcessing", "sep": ["<pad>", 6], "cls": ["<s>", 5], "trim_offsets": True}
    steps = {"type": "Sequence", "processors": [template, roberta, {"type": "ByteLevel", "trim_offsets": True}]}
    padding = {"strategy": "BatchLongest", "pad_id": 6, "pad_token": "<pad>"}
    full = content(post_processor=steps, padding=padding)
    specification = read_specification(full)
    assert ids_of_steps(full) == {5, 6}
    changed = rewrite_tokenizer(specification, renumbering([0, 1, 2, 3, 5, 6]))
    assert changed["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2, "c": 3, "<s>": 4}
    assert changed["model"]["merges"] == ["a b"]
    assert [token["id"] for token in changed["added_tokens"]] == [4, 5]
    template, roberta, other = changed["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"]["ids"] == [4]
    assert (roberta["sep"], roberta["cls"]) == (["<pad>", 5], ["<s>", 4])
    assert other == {"type": "ByteLevel", "trim_offsets": True}
    assert changed["padding"]["pad_id"] == 5
    assert specification.content == content(post_processor=steps, padding=padding)  # the caller's is as before


def test_steps_that_name_no_token_are_refused() -> None:
    padding = {"strategy": "BatchLongest", "pad_id": 77, "pad_token": "<pad>"}
    with pytest.raises(UnsupportedModelError, match="names id 77"):
        rewrite_tokenizer(read_specification(content(padding=padding)), renumbering([0, 1, 3, 5, 6]))


def test_added_tokens_among_others_are_refused() -> None:
    """tokenizers numbers added tokens that the model lacks after all others."""
    vocab = {"a": 0, "b": 1, "c": 8}
    wrong = content(model={"type": "BPE", "vocab": vocab, "merges": []})
    with pytest.raises(UnsupportedModelError, match="before those of other tokens"):
        rewrite_tokenizer(read_specification(wrong), renumbering([0, 1, 5, 6, 8]))
