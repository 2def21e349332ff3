"""The benchmark over families, on two tiny models: its numbers are measured here, too, from the folders it leaves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import families_table
import naive
import zoo
from tests import tiny
from tests.results import load


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of a Llama and an Olmo 2, untrained."""
    monkeypatch.setattr(families, "KINDS", {"llama": {}, "olmo2": {}})
    monkeypatch.setattr(families, "REFERENCE_SIZES", (0.6,))
    for kind in families.KINDS:
        folder = tiny.save(tiny.CASES[kind].build(), tmp_path / "zoo" / kind)
        (folder / zoo.RECORD).write_text(json.dumps({"tokens": 1000}))
    windows = {"train": tiny.structured_ids(24, 16, seed=1), "heldout": tiny.structured_ids(5, 16, seed=2)}
    save_file(windows, tmp_path / "zoo" / zoo.TEXT)
    return tmp_path / "zoo"


def test_results_are_those_of_the_folders(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, work = tmp_path / "families.json", tmp_path / "work"
    arguments = [f"--zoo={cache}", "--keep=0.8", "--samples=12", "--seqlen=16", "--test-windows=4", f"--work={work}"]
    work.mkdir()
    families.main([*arguments, "-o", str(output)])
    result = json.loads(output.read_text())
    assert [(row["kind"], row["keep"]) for row in result["rows"]] == [("llama", 0.8), ("llama", 0.6), ("olmo2", 0.8)]
    ids = load_file(cache / zoo.TEXT)["heldout"][:4]
    for row in result["rows"]:
        dense, (folder,) = load(cache / row["kind"]), work.glob(f"{row['kind']}-{row['keep']:g}-*")
        sliced = load(folder)
        assert row["kept"] == pytest.approx(naive.stored(sliced) / naive.stored(dense))
        kl, ratio = scores(dense, sliced, ids)
        assert (row["kl"], row["ratio"]) == pytest.approx((kl, ratio), rel=1e-3)
        magnitude, late, even = row["naive"]
        assert magnitude["kept"] <= row["kept"] < magnitude["kept"] + 0.05
        channels = naive.Channels.of(dense, ids)
        width = int(magnitude["what"].removeprefix("width "))
        kl, ratio = scores(dense, naive.with_channels(dense, channels.largest(width)), ids)
        assert (magnitude["kl"], magnitude["ratio"]) == pytest.approx((kl, ratio), rel=1e-3)
        for way in (late, even):
            dropped = {int(block) for block in way["what"].removeprefix("without blocks ").split(", ")}
            smaller = naive.without_blocks(dense, dropped)
            assert way["kept"] == pytest.approx(naive.stored(smaller) / naive.stored(dense))
            assert (way["kl"], way["ratio"]) == pytest.approx(scores(dense, smaller, ids), rel=1e-3)
    lines = capsys.readouterr().out
    assert len([line for line in lines.splitlines() if line.startswith("| `")]) == 3
    before = output.read_bytes()
    families.main([*arguments, "-o", str(output)])
    assert output.read_bytes() == before, "what is there stays"
    assert len(list(work.iterdir())) == 3
    families.main([*arguments, "-o", str(output), "olmo2"])
    assert len(list(work.iterdir())) == 4, "a kind that is named is measured anew"


def scores(dense: Any, other: Any, ids: torch.Tensor) -> tuple[float, float]:
    """KL from the dense model in nats per token, and the ratio of the perplexities, in float64."""
    with torch.no_grad():
        p, q = (model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for model in (dense, other))
    losses = [float(-x.gather(-1, ids[:, 1:, None]).mean()) for x in (p, q)]
    return float((p.exp() * (p - q)).sum(-1).mean()), math.exp(losses[1] - losses[0])


def row_of(share: float, loss: float) -> dict[str, Any]:
    return {"kind": "llama", "block_share": share, "ratio": 1 + loss, "kl": 2 * loss}


def test_the_reference_between_its_sizes() -> None:
    """A reference whose excess is 3 (1 - share)^2: log-linear interpolation is exact, outside of its points, too."""
    rows = [row_of(share, 3 * (1 - share) ** 2) for share in (0.9, 0.6, 0.75)]
    for share in (0.95, 0.9, 0.8, 0.7, 0.5):
        expected = 3 * (1 - share) ** 2
        assert families_table.at_share(rows, share, families_table.excess) == pytest.approx(expected)
    assert families_table.at_share(rows[:1], 0.8, families_table.excess) is None
    assert families_table.at_share([*rows, row_of(0.95, -0.01)], 0.8, families_table.excess) == pytest.approx(0.12)
    assert families_table.at_share(rows, 1.0, families_table.excess) is None


def test_the_reference_is_taken_from_the_nearest_points() -> None:
    rows = [row_of(0.9, 0.1), row_of(0.8, 0.2), row_of(0.6, 1.6)]
    assert families_table.at_share(rows, 0.8, families_table.excess) == pytest.approx(0.2)
    assert families_table.at_share(rows, 0.85, families_table.excess) == pytest.approx(0.15)
    assert families_table.at_share(rows, 0.7, families_table.excess) == pytest.approx(0.2 * 1.5**3)


def test_a_table() -> None:
    naive_ways = [
        {"way": "magnitude", "ratio": 1.5, "block_share": 0.8},
        {"way": "late blocks", "ratio": 1.7, "block_share": 0.83},
        {"way": "even blocks", "ratio": 1.6, "block_share": 0.83},
    ]
    plan = {
        "basis": "global",
        "width": 112,
        "neurons": [300, 320, 384],
        "tied": True,
        "key_value_heads": 2,
        "dropped_blocks": [3],
    }
    dense = {"dense_width": 128, "dense_neurons": 384, "dense_heads": 2, "dense_blocks": 4}
    common = {"keep": 0.8, "plan": plan, "dense": dense, "naive": naive_ways, "form": "stock", "trained": 1000}
    llama = [common | row_of(share, 3 * (1 - share) ** 2) | {"saved_as": "llama"} for share in (0.9, 0.7)]
    custom = common | row_of(0.8, 0.24) | {"kind": "olmo2", "form": "custom", "saved_as": "eigenslice"}
    failed = {"kind": "phi", "keep": 0.5, "error": "no plan | is so small\nnext"}
    lines = families_table.table([*llama, custom, failed]).splitlines()
    assert lines[4] == (
        "| `olmo2` | 80 % | custom | width 112 of 128, neurons 300-384 of 384, without blocks 3 | 80.0 % | 0.480 "
        "| 1.240 | x 2.00 | x 2.00 | 1.50 | 1.60 (83 %) |"
    )
    assert lines[2].startswith("| `llama` | 80 % | `llama` |")
    assert "x 1.00 | x 1.00" in lines[2]
    assert lines[5] == "| `phi` | 50 % | - | no plan / is so small |" + " - |" * 7
    assert {line.count("|") for line in lines} == {12}
