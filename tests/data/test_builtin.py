"""The text that ships with CPython."""

import inspect
import json
import sys

import pytest

from eigenslice.data.builtin import language_reference, library_docstrings


@pytest.fixture(scope="module")
def docstrings() -> list[str]:
    return library_docstrings()


def test_the_language_reference_is_long_and_english() -> None:
    texts = language_reference()
    assert sum(map(len, texts)) > 300_000
    assert all(text == text.strip() != "" for text in texts)
    words = " ".join(texts).split()
    assert 0.03 < words.count("the") / len(words) < 0.1


def test_the_language_reference_comes_in_the_same_order_every_time() -> None:
    from pydoc_data.topics import topics

    assert language_reference() == [topics[name].strip() for name in sorted(topics)]


def test_docstrings_are_those_of_the_standard_library(docstrings: list[str]) -> None:
    for thing in (json, json.JSONEncoder, json.dumps):
        assert inspect.getdoc(thing) in docstrings


def test_docstrings_are_long_different_and_enough_for_a_perplexity(docstrings: list[str]) -> None:
    assert min(map(len, docstrings)) >= 400
    assert len(set(docstrings)) == len(docstrings)
    assert sum(map(len, docstrings)) > 500_000


def test_modules_are_read_and_not_run(docstrings: list[str]) -> None:
    """Importing these prints a poem and opens a web page."""
    assert docstrings
    assert not {"this", "antigravity"} & set(sys.modules)


def test_calibration_and_evaluation_texts_differ(docstrings: list[str]) -> None:
    assert not set(docstrings) & set(language_reference())
