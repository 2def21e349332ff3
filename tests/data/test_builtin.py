"""The text that ships with CPython."""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator

import pytest

from eigenslice.data.builtin import language_reference, library_docstrings


@pytest.fixture(scope="module")
def docstrings() -> Iterator[list[str]]:
    """Of a part of the library, as all of it takes a while."""
    modules = frozenset({"argparse", "asyncio", "json", "logging", "this", "antigravity", "sys", "unittest"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdlib_module_names", modules)
        yield library_docstrings()


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
    for thing in (argparse, json, json.JSONEncoder, json.dumps):
        assert inspect.getdoc(thing) in docstrings


def test_docstrings_are_long_and_different(docstrings: list[str]) -> None:
    assert len(docstrings) > 50
    assert min(map(len, docstrings)) >= 400
    assert len(set(docstrings)) == len(docstrings)


def test_modules_are_read_and_not_run(docstrings: list[str]) -> None:
    """Importing these prints a poem and opens a web page."""
    assert docstrings
    assert not {"this", "antigravity"} & set(sys.modules)


def test_calibration_and_evaluation_texts_differ(docstrings: list[str]) -> None:
    assert not set(docstrings) & set(language_reference())
