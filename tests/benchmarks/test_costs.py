"""Counted minutes of large models."""

import json
from pathlib import Path

import pytest

import costs


def test_counts_of_large_models(tmp_path: Path) -> None:
    costs.main(["-o", str(tmp_path / "costs")])
    columns = json.loads((tmp_path / "costs.json").read_text())["columns"]
    small, slow, _, large, shared, _ = columns
    parameters = costs.anatomy_of("8B").parameters
    assert parameters == pytest.approx(8.03e9, rel=0.01)
    passes = 60 * small["kinds"]["forward"] * costs.H100.bfloat16 / (2 * parameters * costs.SAMPLES * costs.LENGTH)
    assert 4 < passes < 12  # measuring, text of its own, trials, and two streams in the last pass
    assert slow["minutes"] > small["minutes"]
    assert (slow["activations"], shared["activations"]) == ("host", "device")
    alone, eighth = (sum(c["kinds"].values()) - c["kinds"]["bus"] for c in (large, shared))
    assert eighth == pytest.approx(alone / 8)
    assert small["minutes"] == pytest.approx(sum(small["stages"].values()) + small["kinds"]["bus"])
    assert (tmp_path / "costs.md").read_text().count("\n") == 14
    for (_, gpu, _), column in zip(costs.COLUMNS, columns, strict=True):
        assert column["working_bytes"] < 0.9 * gpu.memory
