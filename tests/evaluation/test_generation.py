"""Figures of written text: against transformers' own generation and loss, and 4-grams that are counted one by one."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenslice.errors import ActivationError, CheckpointError, OptionsError
from eigenslice.evaluation import generation
from eigenslice.evaluation.generation import Text, agreement, evaluate_generation, figures, repeated_ngrams
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.generating import GenerationOptions
from tests import tiny, words
from tests.checkpoint.files import copy_of
from tests.conftest import Folders, Slicer
from tests.results import load

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [40, 41]]
NEW = 24


@pytest.fixture
def dense(dense_folder: Folders, tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    folder = copy_of(dense_folder("llama"), tmp_path / "dense")
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sliced(dense: Path, run_slice: Slicer) -> Path:
    """A narrower model."""
    return run_slice("llama", model=str(dense), width=28).output


@pytest.fixture
def options(tmp_path: Path) -> GenerationOptions:
    """Three prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(map(words.text, PROMPTS)))
    return GenerationOptions(text=CalibrationOptions(data=str(file)), new=NEW, device="cpu")


def tokens(text: str) -> list[int]:
    return words.tokenizer()(text)["input_ids"]


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    """transformers' most likely continuation."""
    ids = torch.tensor([prompt])
    whole = load(folder).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return whole[0, len(prompt) :].tolist()


def repeated(texts: list[list[int]]) -> float:
    """Share of repeated 4-grams, one after the other."""
    count = again = 0
    for text in texts:
        seen: list[list[int]] = []
        for start in range(len(text)):
            gram = text[start : start + 4]
            if len(gram) == 4:
                count += 1
                again += gram in seen
                seen.append(gram)
    return again / count


def same(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def test_figures_are_those_of_the_formulas(
    dense: Path, sliced: Path, options: GenerationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[Text]] = []

    def watched(texts: list[Text], *arguments: Any) -> dict[str, Any]:
        written.append(texts)
        return figures(texts, *arguments)

    monkeypatch.setattr(generation, "figures", watched)
    result = evaluate_generation([str(dense), str(sliced)], options)
    assert json.loads(json.dumps(result)) == result
    assert [row["model"] for row in result["models"]] == [str(dense), str(sliced)]
    assert result["prompts"] == len(PROMPTS)
    model = load(dense)
    expected = {folder: [greedy(folder, prompt) for prompt in PROMPTS] for folder in (dense, sliced)}
    for texts, greedy_texts, row in zip(written, expected.values(), result["models"], strict=True):
        assert [text.prompt for text in texts] == PROMPTS
        assert [text.greedy for text in texts] == greedy_texts
        assert row["greedy"] == {
            "tokens": sum(map(len, greedy_texts)),
            "repeated": pytest.approx(repeated(greedy_texts)),
        }
        sampled = [text.sampled for text in texts]
        loss = 0.0
        for prompt, text in zip(PROMPTS, sampled, strict=True):
            labels = torch.tensor([[-100] * len(prompt) + text])
            with torch.no_grad():
                loss += float(model(torch.tensor([prompt + text]), labels=labels).loss) * len(text)
        count = sum(map(len, sampled))
        assert (row["sampled"]["tokens"], row["sampled"]["repeated"]) == (count, pytest.approx(repeated(sampled)))
        assert row["sampled"]["dense_perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert sampled != greedy_texts
        for text, shown in zip(texts, row["texts"], strict=True):
            for kind in ("prompt", "greedy", "sampled"):  # words leave out special tokens
                assert tokens(shown[kind]) == [token for token in getattr(text, kind) if token > 3 or kind == "prompt"]
    agreed = [same(a, b) for a, b in zip(*expected.values(), strict=True)]
    assert result["models"][0]["agreement"] is None
    assert result["models"][1]["agreement"] == {"mean": statistics.mean(agreed), "median": statistics.median(agreed)}
    assert 0 < result["models"][0]["greedy"]["repeated"] < 1


def test_sampled_text_is_drawn_with_a_seed_for_each_prompt(dense: Path, options: GenerationOptions) -> None:
    def sampled(seed: int, name: Path = dense) -> list[str]:
        (*_, row) = evaluate_generation([str(name)], options.model_copy(update={"seed": seed}))["models"]
        return [text["sampled"] for text in row["texts"]]

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)
    twice = evaluate_generation([str(dense), str(dense)], options)["models"]
    assert twice[1]["texts"] == twice[0]["texts"], "all models draw with the same random numbers"
    assert twice[1]["sampled"] == twice[0]["sampled"]
    assert twice[1]["agreement"]["mean"] * len(PROMPTS) == twice[0]["greedy"]["tokens"]


def test_long_prompts_are_cut_and_few_are_taken(dense: Path, options: GenerationOptions) -> None:
    few = options.model_copy(update={"prompts": 2, "prompt_tokens": 2})
    result = evaluate_generation([str(dense)], few)
    assert [tokens(text["prompt"]) for text in result["models"][0]["texts"]] == [[5, 6], [9, 10]]


def test_texts_end_where_the_model_ends_them(dense: Path, sliced: Path, options: GenerationOptions) -> None:
    """The token that ends a text is one of its tokens."""
    ends = [greedy(dense, prompt)[2] for prompt in PROMPTS]
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    row = evaluate_generation([str(dense)], options)["models"][0]
    assert row["greedy"]["tokens"] <= 9
    assert all(tokens(text["greedy"])[-1] in ends for text in row["texts"])


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([[1, 2, 3, 4, 5]], 0.0),
        ([[1, 1, 1, 1, 1, 1]], 2 / 3),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),
        ([[1, 2, 1, 2, 1, 2, 1], [7, 7]], 0.5),
        ([[1, 2, 3], []], None),
    ],
)
def test_ngrams_repeat_within_a_text(texts: list[list[int]], share: float | None) -> None:
    assert repeated_ngrams(texts) == (None if share is None else pytest.approx(share))


def test_agreement_ends_with_the_first_difference() -> None:
    assert [agreement(a, [1, 2, 3]) for a in ([1, 2, 3, 4], [1, 9, 3], [2], [], [1, 2, 3])] == [3, 1, 0, 0, 3]


def test_a_model_with_fewer_tokens_is_read_in_the_first_models_ids(
    dense: Path, options: GenerationOptions, tmp_path: Path
) -> None:
    """The same model with its words in another order: all figures are the same."""
    order = [*range(4), *range(words.VOCABULARY - 1, 3, -1)]
    model = load(dense)
    with torch.no_grad():
        for parameter in (model.model.embed_tokens.weight, model.lm_head.weight):
            parameter.copy_(parameter[order])
    other = tmp_path / "other"
    model.save_pretrained(other)
    vocabulary = words.tokenizer()
    tokenizer = json.loads(vocabulary.backend_tokenizer.to_str())
    tokenizer["model"]["vocab"] = {vocabulary.convert_ids_to_tokens(old): new for new, old in enumerate(order)}
    vocabulary.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    first, second = evaluate_generation([str(dense), str(other)], options)["models"]
    assert [text["greedy"] for text in second["texts"]] == [text["greedy"] for text in first["texts"]]
    assert second["greedy"] == first["greedy"]
    assert second["agreement"]["mean"] * len(PROMPTS) == first["greedy"]["tokens"]


def test_a_model_with_tokens_of_its_own_is_refused(dense: Path, options: GenerationOptions, tmp_path: Path) -> None:
    small = tiny.save(tiny.CASES["llama"].build(), tmp_path / "small")
    words.tokenizer(60).save_pretrained(small)
    with pytest.raises(CheckpointError, match="writes the token 'w"):
        evaluate_generation([str(small), str(dense)], options)


def test_what_can_not_be_written(dense: Path, options: GenerationOptions, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="--new 60 after a prompt of 5 tokens") as caught:
        evaluate_generation([str(dense)], options.model_copy(update={"new": 60}))
    assert "--prompt-tokens" in caught.value.next_step
    model = load(dense)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    words.tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(ActivationError, match="NaN"):
        evaluate_generation([str(tmp_path / "broken")], options)


def test_the_dense_model_prefers_its_own_text(dense: Path, options: GenerationOptions, tmp_path: Path) -> None:
    """Another random model's text is unlikely for the first model, whose own text isn't."""
    other: Any = tiny.CASES["llama"].build()
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.roll(7, 0))
        other.lm_head.weight.mul_(3)
    other.save_pretrained(tmp_path / "other")
    words.tokenizer().save_pretrained(tmp_path / "other")
    first, second = evaluate_generation([str(dense), str(tmp_path / "other")], options)["models"]
    assert second["sampled"]["dense_perplexity"] > 1.5 * first["sampled"]["dense_perplexity"]
