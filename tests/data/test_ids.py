"""Token ids that are none, and masks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eigenslice.data import ids as module
from tests.data.test_tokens import from_ids, ids_file, refused, rows
from tests.messages import check_message
from tests.tiny import random_ids


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.full((2, 9), 2), "other numbers than 0 and 1, in int64"),
        (torch.full((2, 9), 0.5), "other numbers than 0 and 1, in float32"),
        (torch.full((2, 9), -1, dtype=torch.int8), "other numbers"),
        (torch.ones(2, 9, dtype=torch.complex64), "other numbers"),
    ],
    ids=str,
)
def test_a_mask_of_other_numbers_is_refused(mask: Tensor, found: str, tmp_path: Path) -> None:
    path = ids_file(tmp_path, calibration=random_ids(2, 9), attention_mask=mask)
    check_message(refused(from_ids, path), "attention_mask", found)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.tensor([[1, 2, -3]], dtype=torch.int8), "has ids from -3 to 2"),
        (torch.tensor([[1, 2, 255]], dtype=torch.uint8), "has ids from 1 to 255"),
        (torch.tensor([[1, 2, 2**63]], dtype=torch.uint64), "as int64"),
        (torch.ones(1, 3, dtype=torch.complex64), "complex64"),
    ],
    ids=str,
)
def test_ids_of_other_dtypes_are_not_wrapped(ids: Tensor, found: str, tmp_path: Path) -> None:
    check_message(refused(from_ids, ids_file(tmp_path, calibration=ids)), found)


def test_too_many_ids_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "MOST", 10)
    check_message(refused(from_ids, ids_file(tmp_path, calibration=random_ids(2, 9))), "18 numbers", "[2, 9]")


def test_the_suffix_of_token_ids_is_told_in_any_case(tmp_path: Path) -> None:
    ids = random_ids(7, 9)
    path = ids_file(tmp_path, calibration=ids).rename(tmp_path / "IDS.SafeTensors")
    assert rows(from_ids(path)) == ids.tolist()
    check_message(refused(from_ids, tmp_path / "none.safetensors"), "none.safetensors", "doesn't exist")
