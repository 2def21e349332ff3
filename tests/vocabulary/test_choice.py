"""Which tokens stay, and what is made of text with them; the reference is the tokenizers library with all tokens."""

import json
import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, models

from eigenslice.errors import OptionsError, UnsupportedModelError
from eigenslice.vocabulary.choice import choose_tokens
from eigenslice.vocabulary.rewriting import renumbering, rewrite_tokenizer
from eigenslice.vocabulary.specification import Specification, merged_from, read_specification
from tests.vocabulary.kinds import KINDS, NOUNS, OTHER, SPECIAL, sentences

TEXTS = {
    "few words": sentences(30, seed=5, nouns=NOUNS[:2]),
    "all words": sentences(200, seed=7),
    "other": OTHER,
    "parts": "riverside mountaineers <unk>able harbour-watch </s> 1234567 \u2581 \u00ff",
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: make() for kind, make in KINDS.items()}


def specification_of(tokenizer: Tokenizer) -> Specification:
    return read_specification(json.loads(tokenizer.to_str()))


def reduced(specification: Specification, kept: list[int]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(rewrite_tokenizer(specification, renumbering(kept))))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_text_has_the_same_tokens(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    full = tokenizers[kind]
    specification, expected = specification_of(full), full.encode(TEXTS[text])
    kept = choose_tokens(specification, Counter(expected.ids), (), None)
    small = reduced(specification, kept)
    assert small.get_vocab_size() == len(kept)
    assert text != "few words" or len(kept) < full.get_vocab_size()  # else nothing is tested
    found = small.encode(TEXTS[text])
    assert found.tokens == expected.tokens
    assert found.ids == [renumbering(kept)[i] for i in expected.ids]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_any_text_is_still_encoded_without_loss(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    full = tokenizers[kind]
    specification = specification_of(full)
    kept = choose_tokens(specification, Counter(full.encode(TEXTS["few words"]).ids), (), None)
    small = reduced(specification, kept)
    for text in (OTHER, TEXTS["all words"], "\u0000\u07ff\uffff\U0010ffff"):
        ids = small.encode(text, add_special_tokens=False).ids
        assert small.decode(ids, skip_special_tokens=False) == text
        assert len(ids) >= len(full.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_in_any_text_that_only_has_kept_tokens(
    kind: str, seed: int, tokenizers: dict[str, Tokenizer]
) -> None:
    """Also in text that had no part in the choice, of any letters."""
    full, draw = tokenizers[kind], random.Random(seed)
    specification = specification_of(full)
    size = full.get_vocab_size()
    counts = Counter(draw.sample(range(size), size // 3))
    kept = choose_tokens(specification, counts, (), None)
    small, ids = reduced(specification, kept), renumbering(kept)
    tested = 0
    letters = "".join({*"".join(NOUNS), *OTHER, " "})
    for _ in range(2000):
        text = " ".join("".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3)))
        expected = full.encode(text).ids
        if set(expected) <= set(kept):
            tested += 1
            assert small.encode(text).ids == [ids[i] for i in expected], text
    assert tested > 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_keeps_exactly_so_many_and_the_most_used_first(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    full = tokenizers[kind]
    specification = specification_of(full)
    counts = Counter(full.encode(TEXTS["all words"]).ids)
    needed = len(choose_tokens(specification, {}, (), None))
    number = (needed + full.get_vocab_size()) // 2
    kept = choose_tokens(specification, counts, (), number)
    assert len(kept) == number
    best, _ = counts.most_common(1)[0]
    assert best in kept
    assert {full.token_to_id(token) for token in SPECIAL} <= set(kept)
    for token in kept:  # closed: each is made in the result as it was
        assert {full.token_to_id(part) for part in merged_from(specification, specification.tokens[token])} <= set(kept)
    with pytest.raises(OptionsError, match=f"--vocabulary {needed - 1}"):
        choose_tokens(specification, counts, (), needed - 1)
    with pytest.raises(OptionsError, match="allowed"):
        choose_tokens(specification, counts, (), full.get_vocab_size() + 1)


def test_unused_tokens_are_taken_by_their_ids() -> None:
    model = models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, [("a", "b"), ("b", "c"), ("ab", "c")])
    specification = specification_of(Tokenizer(model))
    assert choose_tokens(specification, {}, (), 4) == [0, 1, 2, 3]
    assert choose_tokens(specification, {4: 1}, (), 4) == [0, 1, 2, 4]
    assert choose_tokens(specification, {5: 9, 4: 1}, (), 5) == [0, 1, 2, 3, 5]
    assert choose_tokens(specification, {5: 9}, (), 4) == [0, 1, 2, 3]  # abc would need ab, too: there is room for one
    assert choose_tokens(specification, {}, {4}, None) == [0, 1, 2, 4]


def test_unused_tokens_of_the_texts_letters_come_before_others() -> None:
    model = models.BPE({"a": 0, "b": 1, "ж": 2, "жж": 3, "ab": 4, "ba": 5}, [("ж", "ж"), ("a", "b"), ("b", "a")])
    specification = specification_of(Tokenizer(model))
    assert choose_tokens(specification, {0: 5, 1: 5}, (), 4) == [0, 1, 2, 4]
    assert choose_tokens(specification, {0: 5, 1: 5}, (), 5) == [0, 1, 2, 4, 5]
    assert choose_tokens(specification, {2: 5}, (), 4) == [0, 1, 2, 3]
    assert choose_tokens(specification, {0: 5000, 1: 5000, 2: 1}, (), 4) == [0, 1, 2, 4]  # one in 10,000 letters


def test_tokens_that_a_token_is_merged_from() -> None:
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    model = models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "ca": 6}, merges)
    specification = specification_of(Tokenizer(model))
    assert merged_from(specification, "abc") == {"a", "b", "c", "bc", "abc"}  # by way of bc, the earlier merge
    assert merged_from(specification, "ca") == {"ca"}  # no merge makes it


WRONG = {
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "WordLevel": {"model": {"type": "WordLevel", "vocab": {"a": 0}}},
    "end_of_word_suffix": {"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}},
    "dropout": {"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1}},
    "no model": {"added_tokens": []},
    "no BPE tokenizer": {"model": {"type": "BPE", "vocab": {}}},
    "twice": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}},
}


@pytest.mark.parametrize("why", WRONG)
def test_other_tokenizers_are_refused(why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        read_specification(WRONG[why])


def test_added_tokens_without_a_row_are_passed_over() -> None:
    """transformers adds such tokens when it reads the tokenizer of a GGUF."""
    added = [{"id": 5, "content": "<s>", "special": True}, {"id": 2, "content": "<end>", "special": True}]
    content = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": added}
    specification = read_specification(content, rows=5)
    assert specification.ids == {"a": 0, "b": 1, "<end>": 2}
    assert [token["content"] for token in rewrite_tokenizer(specification, {0: 0, 2: 1})["added_tokens"]] == ["<end>"]
    with pytest.raises(UnsupportedModelError, match="token 1, the embedding has 1 rows"):
        read_specification(content, rows=1)


@pytest.mark.parametrize("names", [("<unused0>", "<unused12>"), ("<|reserved_special_token_7|>", "[unused3]")])
def test_added_tokens_that_stand_for_nothing_stay_only_where_they_are_needed(names: tuple[str, str]) -> None:
    model = models.BPE({"a": 0, "b": 1, "ab": 2, "ba": 3}, [("a", "b"), ("b", "a")])
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([*names, "<end>"])
    specification = specification_of(tokenizer)
    assert choose_tokens(specification, {2: 1}, (), None) == [0, 1, 2, 6]
    assert choose_tokens(specification, {5: 1}, (), None) == [0, 1, 5, 6]  # the texts have it
    assert choose_tokens(specification, {}, {4}, None) == [0, 1, 4, 6]  # a config names it
    likely = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert choose_tokens(specification, {}, (), 5, likely) == [0, 1, 2, 3, 6]
    small = reduced(specification, [0, 1, 2, 6])
    assert small.get_vocab() == {"a": 0, "b": 1, "ab": 2, "<end>": 3}
    assert small.encode("ab<end>a").ids == [2, 3, 0]
