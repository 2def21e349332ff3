"""Licence and language of any card, without an error."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from eigenslice.checkpoint.card_metadata import read_card_metadata
from eigenslice.errors import EigensliceWarning


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (b"---\nlicense: mit\nlanguage:\n- en\n- no\n---\n# x", {"license": "mit", "language": ["en", "no"]}),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\nlanguage: no\r\n---\r\n", {"license": "mit", "language": "no"}),
        (b"---\n2024: release\nself: 1\nlicense: mit\ntags: 3\n---\n", {"license": "mit"}),
        (b"---\nx: " + b"[" * 10**5 + b"\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\nlicense: other\nlicense_name: x y\nlicense_link: LICENSE\n---", "other x y LICENSE"),
        (b"---\nlicense: >-\n  apache-2.0\nmodel-index:\n  - license: no\n---\n", {"license": "apache-2.0"}),
        (b"---\nlicense: a\n" * 2 + b"---\n", {"license": "a"}),
        (b"---\nlicense:\nlanguage: []\n---\n", {}),
        (b"---\n" + b"a: b\n" * 10**5 + b"license: mit\n---\n" + b"x" * 10**7, {"license": "mit"}),
        (b"# license: mit\n", {}),
        (b"---\nlicense: mit\n", {}),
        (b"", {}),
    ],
    ids=lambda value: repr(value[:25]) if isinstance(value, bytes) else "",
)
def test_cards(card: bytes, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card)
    found = read_card_metadata(tmp_path / "README.md")
    assert (" ".join(found.values()) if isinstance(expected, str) else found) == expected


@pytest.mark.parametrize(
    "field",
    [
        "license: [mit]",
        "license: {a: b}",
        "license: [",
        "license: " + "x" * 10**5,
        'license: "a\\nb"',
        'license: "a\\u202eb"',
        "license: *x",
        "language: [en, [de]]",
        "language: {en: 1}",
        "language: [" + "[" * 1200,
        "language: ['']",
    ],
    ids=lambda field: field[:20],
)
def test_fields_of_another_kind_are_left_out(field: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{field}\nlicense_name: kept\n---\n")
    with pytest.warns(EigensliceWarning, match=f"has {field.partition(':')[0]} of another kind"):
        found = read_card_metadata(tmp_path / "README.md")
    assert found == {"license_name": "kept"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_card_metadata(tmp_path / "README.md", warn=False) == found


def test_what_is_no_file_has_no_metadata(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "nothing", "."):
        assert read_card_metadata(tmp_path / name) == {}
    with pytest.warns(EigensliceWarning, match="can't be read"):
        assert read_card_metadata(tmp_path / ("x" * 300)) == {}
