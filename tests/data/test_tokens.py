"""Sequences of tokens: windows of texts, and token ids from files."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenslice.data import Tokens, calibration_tokens, evaluation_tokens
from eigenslice.data.tokens import BATCH_TOKENS
from eigenslice.errors import CalibrationError, CheckpointError, EigensliceWarning
from eigenslice.options.calibration_text import CalibrationOptions
from tests import words
from tests.messages import check_message
from tests.tiny import VOCABULARY, random_ids

WIDTH = 4
CONFIG = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=WIDTH)
IDS = random_ids(1, 43)[0].tolist()  # of a text of 43 words


def no_tokenizer() -> Any:
    pytest.fail("token ids need no tokenizer")


def rows(tokens: Tokens) -> list[list[int]]:
    """All sequences in their order."""
    return [row.tolist() for batch in tokens.batches for row in batch.input_ids]


def masks(tokens: Tokens) -> list[list[int]]:
    """All sequences' masks in their order."""
    return [row.tolist() for batch in tokens.batches for row in torch.as_tensor(batch.attention_mask)]


def groups(tokens: Tokens) -> list[int]:
    """The group of each sequence."""
    return [batch.group for batch in tokens.batches for _ in batch.input_ids]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words.text(IDS))
    return path


def ids_file(folder: Path, **tensors: Tensor) -> Path:
    path = folder / "ids.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def calibrate(path: Path, config: Any = CONFIG, **options: Any) -> Tokens:
    chosen = CalibrationOptions(**{"data": str(path), "samples": 8, "seqlen": 5} | options)
    return calibration_tokens(chosen, words.tokenizer, config)


def evaluate(path: Path, **options: Any) -> Tokens:
    chosen = CalibrationOptions(**{"data": str(path), "samples": 100, "seqlen": 5} | options)
    return evaluation_tokens(chosen, words.tokenizer, CONFIG)


def from_ids(path: Path, field: str | None = None, config: Any = CONFIG) -> Tokens:
    return calibration_tokens(CalibrationOptions(data=str(path), field=field), no_tokenizer, config)


def refused(use: Callable[..., Tokens], *args: Any, **kwargs: Any) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        use(*args, **kwargs)
    return caught.value


WINDOWS = [IDS[i : i + 5] for i in range(0, 40, 5)]


def test_calibration_takes_all_full_windows_in_some_order(text: Path) -> None:
    tokens = calibrate(text)
    assert sorted(rows(tokens)) == sorted(WINDOWS)
    assert rows(tokens) != WINDOWS
    assert tokens.count == 40
    assert all(batch.attention_mask is None for batch in tokens.batches)


def test_calibration_takes_as_many_windows_as_asked_for_without_repeating_one(text: Path) -> None:
    found = rows(calibrate(text, samples=5))
    assert len(found) == len({tuple(row) for row in found}) == 5
    assert all(row in WINDOWS for row in found)


def test_the_seed_decides_which_windows(text: Path) -> None:
    draws = [rows(calibrate(text, samples=4, seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({str(sorted(draw)) for draw in draws}) > 1
    assert draws[0] != draws[2] != draws[3]


def test_drawing_leaves_the_global_generator_alone(text: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    calibrate(text)
    assert torch.equal(torch.rand(3), expected)


def test_the_description_tells_source_sizes_and_seed(text: Path) -> None:
    expected = {"data": "text.txt", "sequences": 6, "seqlen": 5, "tokens": 30, "seed": 3}
    assert calibrate(text, samples=6, seed=3).description == expected


def test_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    class Spy:
        def __call__(self, text: str, **kwargs: Any) -> Any:
            self.text = text
            return words.tokenizer()(text, **kwargs)

    path, spy = tmp_path / "a.json", Spy()
    path.write_text('["w5 w6", "w7 w8"]')
    options = CalibrationOptions(data=str(path), samples=2, seqlen=2)
    tokens = evaluation_tokens(options, lambda: spy, CONFIG)
    assert spy.text == "w5 w6\n\nw7 w8"
    assert rows(tokens) == [[5, 6], [7, 8]]


def test_few_tokens_are_warned_of(text: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(text, SimpleNamespace(**CONFIG.__dict__ | {"hidden_size": 10}))  # 40 tokens, 4 x 10
    with pytest.warns(EigensliceWarning, match="40 calibration tokens are few for a width of 11"):
        calibrate(text, SimpleNamespace(**CONFIG.__dict__ | {"hidden_size": 11}))


def test_few_sequences_are_warned_of_and_the_short_last_one_is_used(text: Path) -> None:
    with pytest.warns(EigensliceWarning, match="holds only 9 sequences of 5 tokens; 10 were asked for"):
        tokens = calibrate(text, samples=10)
    assert sorted(rows(tokens)) == sorted([*WINDOWS, IDS[40:]])


def test_sequences_longer_than_the_model_takes_are_cut_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(words.text(IDS * 4))
    with pytest.warns(EigensliceWarning, match="--seqlen 100 is more than the model's 64 positions"):
        tokens = calibrate(path, samples=2, seqlen=100)
    assert [len(row) for row in rows(tokens)] == [64, 64]
    assert tokens.description["seqlen"] == 64


def test_a_model_without_limit_takes_any_length(text: Path) -> None:
    config = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=WIDTH)
    assert rows(calibrate(text, config, samples=1, seqlen=43)) == [IDS]


@pytest.mark.parametrize("content", ["", " \n", "w7"], ids=["empty", "blank", "one-token"])
def test_less_than_two_tokens_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(content)
    check_message(refused(calibrate, tmp_path / "short.txt"), "short.txt", "holds")


def test_a_tokenizer_of_another_model_is_refused(text: Path) -> None:
    """Its ids would be past the end of the embedding."""
    small = SimpleNamespace(**CONFIG.__dict__ | {"vocab_size": 50})
    assert max(IDS) >= 50
    check_message(refused(calibrate, text, small), str(max(IDS)))


def test_a_checkpoint_without_tokenizer_is_told_so(text: Path) -> None:
    def missing() -> Any:
        raise CheckpointError("no tokenizer", allowed="one", next_step="add it")

    with pytest.raises(CheckpointError, match="no tokenizer"):
        calibration_tokens(CalibrationOptions(data=str(text), seqlen=5), missing, CONFIG)


def test_evaluation_takes_the_first_windows_in_order(text: Path) -> None:
    assert rows(evaluate(text, samples=3)) == WINDOWS[:3]
    assert rows(evaluate(text, samples=8)) == WINDOWS


@pytest.mark.parametrize("samples", [9, 100])
def test_evaluation_includes_the_short_last_window(samples: int, text: Path) -> None:
    tokens = evaluate(text, samples=samples)
    assert rows(tokens) == [*WINDOWS, IDS[40:]]
    assert tokens.description["tokens"] == tokens.count == 43
    assert tokens.description["sequences"] == 9


def test_a_last_window_of_one_token_predicts_nothing_and_is_left_out(text: Path) -> None:
    assert rows(evaluate(text, seqlen=6)) == [IDS[i : i + 6] for i in range(0, 42, 6)]


def test_a_text_shorter_than_a_window_is_one_window(text: Path) -> None:
    assert rows(evaluate(text, seqlen=60)) == [IDS]


def test_evaluation_does_not_depend_on_the_seed(text: Path) -> None:
    assert rows(evaluate(text, seed=1)) == rows(evaluate(text, seed=2))


def test_evaluation_reads_a_data_set_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    lines = [f'{{"text": "{words.text(IDS[i : i + 5])}"}}' for i in range(0, 40, 5)]
    (tmp_path / "corpus" / "train.jsonl").write_text("\n".join(lines))
    assert rows(evaluate(tmp_path / "corpus", samples=3)) == WINDOWS[:3]


def test_batches_hold_at_most_so_many_tokens(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(words.text(IDS * 300))  # 12900 tokens
    tokens = evaluate(path, samples=1000, seqlen=50)
    sizes = [batch.input_ids.numel() for batch in tokens.batches]
    assert sum(sizes) == 12_900
    assert max(sizes) <= BATCH_TOKENS
    assert len(sizes) == 8  # 40 windows are 2000 tokens: of each quarter, that and the rest


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8", "uint16", "uint32"])
def test_token_ids_are_used_as_they_are_and_in_order(dtype: str, tmp_path: Path) -> None:
    ids = random_ids(7, 9)
    tokens = from_ids(ids_file(tmp_path, calibration=ids.to(getattr(torch, dtype))))
    assert rows(tokens) == ids.tolist()
    assert all(batch.input_ids.dtype == torch.int64 for batch in tokens.batches)
    assert all(batch.attention_mask is None for batch in tokens.batches)
    expected = {"data": "ids.safetensors, tensor 'calibration'", "sequences": 7, "seqlen": 9, "tokens": 63}
    assert tokens.description == expected


def test_many_token_ids_come_in_batches(tmp_path: Path) -> None:
    ids = random_ids(200, 50)
    mask = torch.ones_like(ids)
    mask[::3, :10] = 0
    tokens = from_ids(ids_file(tmp_path, calibration=ids, attention_mask=mask))
    assert rows(tokens) == ids.tolist()
    assert masks(tokens) == mask.tolist()
    assert tokens.count == int(mask.sum())
    assert len(tokens.batches) > 1
    assert all(batch.input_ids.numel() <= BATCH_TOKENS for batch in tokens.batches)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 12, 200, 1000])
def test_token_ids_are_in_groups_of_neighbours_of_similar_size(count: int, tmp_path: Path) -> None:
    """So that what is fitted on some can be tried on others, wherever there are two."""
    tokens = from_ids(ids_file(tmp_path, calibration=random_ids(count, 50)))
    assert groups(tokens) == sorted(groups(tokens))
    sizes = Counter(groups(tokens))
    assert len(sizes) == min(count, 4)
    assert max(sizes.values()) <= 2 * min(sizes.values())
    if count in (4, 12, 200):
        assert list(sizes.values()) == [count // 4] * 4


@pytest.mark.parametrize("count", [4, 6, 8])
def test_the_windows_of_one_text_are_in_four_groups_one_after_the_other(count: int, text: Path) -> None:
    tokens = calibrate(text, samples=count)
    assert groups(tokens) == [4 * number // count for number in range(count)]
    assert set(groups(tokens)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("count", "seqlen"), [(1, 43), (2, 20), (3, 14)])
def test_few_windows_are_a_group_each(count: int, seqlen: int, text: Path) -> None:
    assert len(set(groups(calibrate(text, samples=count, seqlen=seqlen)))) == count


def test_windows_of_different_groups_are_in_different_batches(text: Path) -> None:
    tokens = calibrate(text, samples=8)
    assert [len(batch.input_ids) for batch in tokens.batches] == [2, 2, 2, 2]


def test_the_field_names_the_tensor(tmp_path: Path) -> None:
    first, second = random_ids(2, 9, seed=1), random_ids(2, 9, seed=2)
    path = ids_file(tmp_path, calibration=first, evaluation=second)
    assert rows(from_ids(path, "evaluation")) == second.tolist()
    assert rows(from_ids(path)) == first.tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
def test_a_mask_beside_the_ids_marks_padding(dtype: torch.dtype, tmp_path: Path) -> None:
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    tokens = from_ids(ids_file(tmp_path, calibration=ids, attention_mask=mask.to(dtype)))
    assert tokens.count == tokens.description["tokens"] == 23
    assert rows(tokens) == ids.tolist()
    assert masks(tokens) == mask.tolist()


def test_a_tensor_that_is_not_there_is_refused_and_those_there_are_named(tmp_path: Path) -> None:
    path = ids_file(tmp_path, one=random_ids(2, 9), two=random_ids(2, 9))
    for field in (None, "three"):
        error = refused(from_ids, path, field)
        check_message(error, repr(field or "calibration"), "one", "two")
        assert "--field" in error.next_step


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.ones(2, 9), "float32 of shape (2, 9)"),
        (torch.ones(2, 9, dtype=torch.bool), "bool"),
        (torch.ones(18, dtype=torch.int64), "int64 of shape (18,)"),
        (torch.ones(2, 3, 3, dtype=torch.int64), "shape (2, 3, 3)"),
        (torch.ones(0, 9, dtype=torch.int64), "is empty"),
        (torch.ones(9, 0, dtype=torch.int64), "is empty"),
        (torch.ones(9, 1, dtype=torch.int64), "sequences of less than 2 tokens"),
        (torch.full((2, 9), VOCABULARY), f"has ids from {VOCABULARY} to {VOCABULARY}"),
        (torch.full((2, 9), -1), "has ids from -1 to -1"),
        (torch.ones(2, 65, dtype=torch.int64), "sequences of 65 tokens; the model takes 64"),
    ],
    ids=["float", "bool", "1-d", "3-d", "no-row", "no-column", "one-column", "above", "below", "too-long"],
)
def test_tensors_that_are_no_token_ids_are_refused(ids: Tensor, found: str, tmp_path: Path) -> None:
    error = refused(from_ids, ids_file(tmp_path, calibration=ids))
    check_message(error, "ids.safetensors", "'calibration'", found)
    assert f"0 to {VOCABULARY - 1}" in error.allowed


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(2, 8, dtype=torch.int64), "of shape (2, 8)"),
        (torch.ones(9, dtype=torch.int64), "of shape (9,)"),
        (torch.zeros(2, 9, dtype=torch.int64), "marks 0 tokens"),
    ],
    ids=["too-narrow", "1-d", "nothing"],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, found: str, tmp_path: Path) -> None:
    path = ids_file(tmp_path, calibration=random_ids(2, 9), attention_mask=mask)
    check_message(refused(from_ids, path), "attention_mask", found)


@pytest.mark.parametrize("content", [b"", b"garbage" * 10, (2**60).to_bytes(8, "little") + b"{}"])
def test_a_broken_file_of_token_ids_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ids.safetensors").write_bytes(content)
    check_message(refused(from_ids, tmp_path / "ids.safetensors"), "ids.safetensors", "not a readable")


def test_few_token_ids_are_warned_of(tmp_path: Path) -> None:
    path = ids_file(tmp_path, calibration=random_ids(1, 15))
    with pytest.warns(EigensliceWarning, match="15 calibration tokens are few"):
        from_ids(path)


def test_padding_does_not_count_as_calibration_tokens(tmp_path: Path) -> None:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    path = ids_file(tmp_path, calibration=random_ids(2, 9), attention_mask=mask)
    with pytest.warns(EigensliceWarning, match="15 calibration tokens are few"):
        from_ids(path)


def test_evaluation_takes_token_ids_as_they_are_without_a_warning(tmp_path: Path) -> None:
    ids = random_ids(1, 5)
    options = CalibrationOptions(data=str(ids_file(tmp_path, calibration=ids)), samples=1)
    assert rows(evaluation_tokens(options, no_tokenizer, CONFIG)) == ids.tolist()


NARROW = SimpleNamespace(**CONFIG.__dict__ | {"hidden_size": 1})  # for which few tokens are enough


def chat_tokenizer() -> Any:
    tokenizer = words.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
    return tokenizer


def test_conversations_are_read_in_the_chat_template_by_calibration_and_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    options = CalibrationOptions(data=str(path), samples=2, seqlen=5)
    expected = [[5, 6, 2, 7, 2]] * 2  # </s> is 2
    for tokens in (
        calibration_tokens(options, chat_tokenizer, NARROW),
        evaluation_tokens(options, chat_tokenizer, NARROW),
    ):
        assert rows(tokens) == expected
        assert tokens.description["data"] == "a.jsonl, chat template"
    plain = calibration_tokens(CalibrationOptions(data=str(path), samples=2, seqlen=3), chat_tokenizer, NARROW, False)
    assert rows(plain) == [[5, 6, 7]] * 2


def test_conversations_without_a_chat_template_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"question": "w5 w6", "answer": "w7 w8"}]')
    with pytest.warns(EigensliceWarning, match="no chat template"):
        tokens = calibrate(path, NARROW, samples=1, seqlen=4)
    assert rows(tokens) == [[5, 6, 7, 8]]


def test_records_that_are_left_out_are_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("null\n" + json.dumps({"text": words.text(IDS)}) + "\n3\n")
    with pytest.warns(EigensliceWarning) as caught:
        tokens = evaluate(path, samples=8)
    assert rows(tokens) == WINDOWS
    (warning,) = caught
    assert "2 of 3 records can't be used" in str(warning.message)


def test_a_long_file_is_evaluated_as_if_it_were_read_to_its_end(tmp_path: Path) -> None:
    """Of 300 characters a token, so that more has to be read than is guessed first."""
    for name, text in (("a.txt", "{}"), ("a.jsonl", '"{}"')):
        path = tmp_path / name
        path.write_text("\n".join(text.format(f"w{i}" + " " * 300) for i in IDS))
        assert rows(evaluate(path, samples=3)) == WINDOWS[:3]
        assert rows(evaluate(path, samples=9)) == [*WINDOWS, IDS[40:]]


class Broken:
    """A tokenizer that gives what it shouldn't."""

    chat_template = None

    def __init__(self, result: Any) -> None:
        self._result = result

    def __call__(self, text: str, **_: Any) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return {"input_ids": self._result}


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (RuntimeError("no words\nsee there"), r"the tokenizer can't read .*\(RuntimeError: no words\)"),
        (None, "the tokenizer can't read"),
        ([["w5"]], "the tokenizer can't read"),
        (torch.zeros(1, 0), "holds 0 tokens"),
        (torch.tensor([[5, -1, 6]]), "token id -1"),
        (torch.tensor([[5, 10**9, 6]]), "token id 1000000000"),
    ],
    ids=str,
)
def test_what_a_tokenizer_gives_is_checked(result: Any, found: str, text: Path) -> None:
    options = CalibrationOptions(data=str(text), samples=1, seqlen=4)
    with pytest.raises(CalibrationError, match=found):
        calibration_tokens(options, lambda: Broken(result), CONFIG)
