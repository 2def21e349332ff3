"""Moments on disk."""

from pathlib import Path

import pytest
import torch

from eigenslice.checkpoint.moments import MomentStore


def test_matrices_come_back_by_site_and_the_folder_goes(tmp_path: Path) -> None:
    matrices = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with MomentStore(tmp_path) as store:
        for site, matrix in enumerate(matrices):
            store.put(site, matrix)
        for site in (2, 0, 1):
            found = store.get(site, torch.device("cpu"))
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, matrices[site], rtol=1e-6, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with MomentStore(tmp_path) as store:
            store.put(0, torch.eye(2))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []
