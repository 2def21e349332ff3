"""Several texts together: shares, order, fields, and what can't be mixed."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eigenslice.data import Tokens, calibration_tokens, evaluation_tokens
from eigenslice.data.sources import Source, one_by_one, sources
from eigenslice.data.texts import MIXTURES, PRESETS
from eigenslice.errors import CalibrationError, EigensliceWarning, OptionsError
from eigenslice.options.calibration_text import CalibrationOptions
from tests import words
from tests.data.test_tokens import CONFIG, IDS, calibrate, groups, no_tokenizer, rows
from tests.messages import check_message

SEQLEN = 4
STARTS = {"a": 10, "b": 30, "c": 50, "d": 70}
"""The words of each text are the 20 from here on, so that a window tells its text."""


def text(folder: Path, name: str, windows: int, rest: int = 0) -> Path:
    """A text of so many windows and some words more."""
    count = windows * SEQLEN + rest
    ids = [STARTS[name] + i % 20 for i in range(count)]
    path = folder / f"{name}.txt"
    path.write_text(words.text(ids))
    return path


def texts(folder: Path, **windows: int) -> list[str]:
    return [str(text(folder, name, count)) for name, count in windows.items()]


def mix(data: list[str], samples: int, **options: Any) -> Tokens:
    chosen = CalibrationOptions(data=tuple(data), samples=samples, seqlen=SEQLEN, **options)
    return calibration_tokens(chosen, words.tokenizer, CONFIG)


def origins(tokens: Tokens) -> str:
    """Which text each window is of."""
    return "".join(name for row in rows(tokens) for name, start in STARTS.items() if start <= row[0] < start + 20)


def refused(data: list[str], samples: int = 8) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        mix(data, samples)
    return caught.value


def test_texts_take_turns(tmp_path: Path) -> None:
    assert origins(mix(texts(tmp_path, a=9, b=9, c=9, d=9), 12)) == "abcdabcdabcd"


def test_the_first_texts_get_what_does_not_divide(tmp_path: Path) -> None:
    tokens = mix(texts(tmp_path, a=9, b=9, c=9), 8)
    assert origins(tokens) == "abcabcab"
    assert [part["sequences"] for part in tokens.description["data"]] == [3, 3, 2]


@pytest.mark.parametrize("seed", [0, 5])
def test_each_text_gives_the_windows_that_it_gives_alone(seed: int, tmp_path: Path) -> None:
    data = texts(tmp_path, a=9, b=7)
    mixed = rows(mix(data, 8, seed=seed))
    assert mixed[0::2] == rows(mix(data[:1], 4, seed=seed))
    assert mixed[1::2] == rows(mix(data[1:], 4, seed=seed))


def test_one_text_is_as_it_was_before_there_were_mixtures(tmp_path: Path) -> None:
    """Windows in the order of torch's permutation by the seed."""
    path = tmp_path / "text.txt"
    path.write_text(words.text(IDS))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))[:6].tolist()
    tokens = calibrate(path, samples=6, seed=3)
    assert rows(tokens) == [IDS[i * 5 : i * 5 + 5] for i in order]
    assert tokens.description["data"] == "text.txt"


def test_a_text_that_ends_too_soon_is_warned_of_and_the_others_fill_up(tmp_path: Path) -> None:
    with pytest.warns(EigensliceWarning, match=r"b\.txt holds only 1 sequences of 4 tokens; 4 were asked for"):
        tokens = mix(texts(tmp_path, a=9, b=1, c=9), 12)
    assert origins(tokens) == "abcacacacaca"
    counts = Counter(origins(tokens))
    assert [part["sequences"] for part in tokens.description["data"]] == [counts[name] for name in "abc"]


def test_texts_that_are_too_short_together_are_all_used(tmp_path: Path) -> None:
    with pytest.warns(EigensliceWarning, match="holds only"):
        tokens = mix(texts(tmp_path, a=2, b=5), 12)
    assert origins(tokens) == "abab" + "bbb"
    assert tokens.description["sequences"] == 7


def test_a_short_last_window_counts_where_the_share_needs_it(tmp_path: Path) -> None:
    data = [str(text(tmp_path, "a", 2, rest=3)), str(text(tmp_path, "b", 5, rest=3))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = mix(data, 6)
    assert sorted(len(row) for row in rows(tokens) if row[0] < 30) == [3, 4, 4]
    assert [len(row) for row in rows(tokens) if row[0] >= 30] == [4, 4, 4]
    assert tokens.description["tokens"] == tokens.count == 23


def test_each_text_is_a_group(tmp_path: Path) -> None:
    tokens = mix(texts(tmp_path, a=9, b=9, c=9), 8)
    assert groups(tokens) == ["abc".index(name) for name in origins(tokens)] == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.warns(EigensliceWarning, match="holds only"):
        tokens = mix(texts(tmp_path, a=9, b=1, c=9), 12)
    assert groups(tokens) == ["abc".index(name) for name in origins(tokens)]


def test_a_short_last_window_stays_in_its_texts_group(tmp_path: Path) -> None:
    tokens = mix([str(text(tmp_path, "a", 2, rest=3)), str(text(tmp_path, "b", 5))], 6)
    assert sorted(len(row) for row in rows(tokens)) == [3, 4, 4, 4, 4, 4]
    assert groups(tokens) == ["ab".index(name) for name in origins(tokens)]


def test_the_description_lists_the_texts(tmp_path: Path) -> None:
    description = mix(texts(tmp_path, a=5, b=5), 6, seed=2).description
    parts = [{"data": "a.txt", "sequences": 3}, {"data": "b.txt", "sequences": 3}]
    assert description == {"data": parts, "sequences": 6, "seqlen": 4, "tokens": 24, "seed": 2}
    assert json.loads(json.dumps(description)) == description


def test_options_are_kept_as_tuples_and_as_json() -> None:
    for data, field in (("a", "x"), (("a",), ("x",)), (["a"], ["x"])):
        options = CalibrationOptions(data=data, field=field)  # pyright: ignore[reportArgumentType]
        assert (options.data, options.field) == (("a",), ("x",))
    options = CalibrationOptions(data=("a", "b"))
    assert (options.data, options.field) == (("a", "b"), ())
    dumped = json.loads(json.dumps(options.model_dump(mode="json")))
    assert dumped["data"] == ["a", "b"]
    assert CalibrationOptions(**dumped) == options


@pytest.mark.parametrize(("texts", "fields"), [(1, 2), (3, 2), (2, 3)])
def test_a_wrong_number_of_fields_is_refused(texts: int, fields: int) -> None:
    with pytest.raises(OptionsError) as caught:
        CalibrationOptions(data=tuple("abc"[:texts]), field=tuple("xyz"[:fields]))
    check_message(caught.value, f"{fields} times --field for {texts} texts")


def test_no_text_at_all_is_refused() -> None:
    with pytest.raises(OptionsError) as caught:
        CalibrationOptions(data=())
    check_message(caught.value, "no text")


def test_one_field_is_for_all_that_have_none_of_their_own() -> None:
    chosen = CalibrationOptions(data=("alpaca", "mine.jsonl", "builtin", "some/set"), field="body")
    assert [source.field for source in sources(chosen)] == [None, "body", None, "body"]


def test_one_field_for_one_preset_is_meant_for_it() -> None:
    chosen = CalibrationOptions(data="alpaca", field="instruction,output")
    assert sources(chosen) == [Source("alpaca", "instruction,output")]


def test_a_field_for_each_text(tmp_path: Path) -> None:
    for name, field in (("a", "body"), ("b", "story")):
        ids = [words.text([STARTS[name] + i % 20 for i in range(SEQLEN * 3)])]
        (tmp_path / f"{name}.json").write_text(json.dumps([{field: part} for part in ids]))
    data = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(text(tmp_path, "c", 4))]
    assert origins(mix(data, 9, field=("body", "story", ""))) == "abcabcabc"
    with pytest.raises(CalibrationError, match="field body"):
        mix(data, 9, field="body")


def test_a_mixture_stands_for_its_members_among_other_texts() -> None:
    for name, members in MIXTURES.items():
        assert 4 <= len(members) <= 6
        found = sources(CalibrationOptions(data=(name, "mine.txt", "yours.jsonl"), field=("", "", "body")))
        assert found == [*(Source(member, None) for member in members), Source("mine.txt", None), found[-1]]
        assert found[-1] == Source("yours.jsonl", "body")


def test_mixtures_are_of_presets_whose_parts_differ() -> None:
    for members in MIXTURES.values():
        assert len(set(members)) == len(members)
        assert all(PRESETS[member].calibration != PRESETS[member].evaluation for member in members)


def test_the_default_is_the_mixture() -> None:
    assert [source.data for source in sources(CalibrationOptions())] == list(MIXTURES["mixed"])


class Hub:
    """Stands in for `datasets.load_dataset`: rows in each data set's own field, and a record of what was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, dict[str, Any]] = {}

    def __call__(self, path: str, config: str | None, **options: Any) -> Any:
        self.asked[path] = {"config": config} | options
        (field,) = {hub.field for hub in PRESETS.values() if hub.path == path}
        start = 10 + 15 * list(self.asked).index(path)
        found = [{field: words.text([start + i % 15 for i in range(SEQLEN)]), "number": 7} for _ in range(200)]
        return Rows(found) if options["streaming"] else found


class Rows(list[dict[str, Any]]):
    """A streamed data set."""

    def shuffle(self, seed: int, buffer_size: int) -> "Rows":
        return self


def test_the_mixed_preset_reads_each_member_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    tokens = mix(["mixed"], 15)
    members = MIXTURES["mixed"]
    assert list(hub.asked) == [PRESETS[member].path for member in members]
    for member in members:
        preset, asked = PRESETS[member], hub.asked[PRESETS[member].path]
        found = asked["config"], asked["data_files"], asked["split"], asked["streaming"]
        assert found == (preset.config, preset.files, preset.calibration, preset.stream)
    assert [row[0] for row in rows(tokens)] == [10, 25, 40, 55, 70] * 3
    expected = [{"data": f"{m} ({PRESETS[m].calibration})", "sequences": 3} for m in members]
    assert tokens.description["data"] == expected


def test_fewer_sequences_than_texts_are_refused() -> None:
    check_message(refused(["mixed"], samples=4), "--samples 4 for 5 texts", "tinystories")


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    check_message(refused(["mixed", "alpaca"]), "alpaca is there twice")
    path = str(text(tmp_path, "a", 5))
    check_message(refused([path, path]), "a.txt is there twice")


@pytest.mark.parametrize("first", [True, False])
def test_token_ids_are_not_mixed_with_texts(first: bool, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"calibration": torch.ones(4, 9, dtype=torch.int64)}, ids)
    data = [str(ids), *texts(tmp_path, a=5)]
    error = refused(data if first else data[::-1])
    check_message(error, "ids.safetensors holds token ids", "1 other texts")
    assert "either" in error.allowed


def test_a_text_that_can_not_be_read_ends_the_mixture(tmp_path: Path) -> None:
    check_message(refused([*texts(tmp_path, a=5), "/no/such/file.txt"]), "/no/such/file.txt")


def test_a_perplexity_is_measured_on_one_text(tmp_path: Path) -> None:
    data = texts(tmp_path, a=5, b=5)
    with pytest.raises(CalibrationError) as caught:
        evaluation_tokens(CalibrationOptions(data=tuple(data)), no_tokenizer, CONFIG)
    check_message(caught.value, "2 texts to measure one perplexity on", "a.txt", "b.txt")


def test_texts_one_by_one() -> None:
    chosen = CalibrationOptions(data=("mine.jsonl", "mixed", "alpaca"), field=("body", "", ""), samples=3)
    each = one_by_one(chosen)
    assert [c.data for c in each] == [("mine.jsonl",), *((member,) for member in MIXTURES["mixed"])]
    assert [c.field for c in each] == [("body",), *((),) * len(MIXTURES["mixed"])]
    assert {c.samples for c in each} == {3}
