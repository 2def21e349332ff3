"""Files that are read whole are ordinary, small and shallow."""

import json
import os
from pathlib import Path

import pytest

from eigenslice.runtime.reading import LEVELS, parsed_json, read_json, read_text


def test_text_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}")
    (tmp_path / "b").write_bytes("ü".encode())
    assert read_json(tmp_path / "a") == {}
    assert read_text(tmp_path / "b", 2) == "ü"
    with pytest.raises(ValueError, match="more than 1 bytes"):
        read_text(tmp_path / "b", 1)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/dev/zero")
    with pytest.raises(ValueError, match="no ordinary file"):
        read_text(path, 10)


def nested(levels: int) -> str:
    return '{"a": [' * (levels // 2) + "1" + "]}" * (levels // 2)


def test_deep_json_is_refused() -> None:
    assert json.dumps(parsed_json(nested(LEVELS - 2))).replace(" ", "") == nested(LEVELS - 2).replace(" ", "")
    for levels in (LEVELS + 2, 10**6):
        with pytest.raises(ValueError, match="nested"):
            parsed_json(nested(levels))


def test_a_field_twice() -> None:
    text = '{"a": 1, "b": {"c": 1, "c": 2}}'
    assert parsed_json(text)["b"] == {"c": 2}
    with pytest.raises(ValueError, match="twice"):
        parsed_json(text, unique=True)
