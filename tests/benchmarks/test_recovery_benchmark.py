"""The recovery benchmark on a tiny Llama: its numbers are perplexities that are measured here, too."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

import recovery
from eigenslice.data.batches import Batch
from eigenslice.evaluation.perplexity import perplexity
from tests import tiny
from tests.conftest import Folders, Slicer
from tests.results import load


def test_ratios_before_and_after(dense_folder: Folders, run_slice: Slicer, tmp_path: Path) -> None:
    dense, sliced = dense_folder("llama"), run_slice("llama", width=16).output
    train, held_out = tiny.structured_ids(40, 16, seed=5), tiny.structured_ids(6, 16, seed=6)
    save_file({"calibration": train}, tmp_path / "train.safetensors")
    save_file({"ids": held_out}, tmp_path / "test.safetensors")
    output, work = tmp_path / "result", tmp_path / "work"
    arguments = [str(dense), str(sliced), "--train", str(tmp_path / "train.safetensors")]
    arguments += [
        "--test",
        f"held={tmp_path / 'test.safetensors'}#ids",
        "--tokens",
        "576",
        "--ways",
        "full,full-next-token",
    ]
    arguments += [
        "--seqlen",
        "16",
        "--held-out",
        "4",
        "--learning-rate",
        "0.01",
        "--work",
        str(work),
        "-o",
        str(output),
    ]
    recovery.main(arguments)
    result = json.loads(output.with_name("result.json").read_text())

    def measured(folder: Path) -> float:
        return perplexity(load(folder), [Batch(held_out)]).perplexity

    expected = {name: measured(folder) for name, folder in (("dense", dense), ("before", sliced))}
    assert result["tests"]["held"]["perplexity"] == pytest.approx(expected["dense"], rel=1e-5)
    assert result["before"]["held"] == pytest.approx(expected["before"] / expected["dense"], rel=1e-5)
    for row in result["rows"]:
        ratio = measured(work / f"{row['way']}-576") / expected["dense"]
        assert row["ratio"]["held"] == pytest.approx(ratio, rel=1e-5)
        assert 1 - row["won_back"] == pytest.approx((ratio - 1) / (result["before"]["held"] - 1), rel=1e-5)
    teachers = [json.loads((work / f"{row['way']}-576" / "eigenslice.json").read_text()) for row in result["rows"]]
    assert [manifest["finetune"]["teacher"] for manifest in teachers] == [str(dense), None]
    table = output.with_name("result.md").read_text()
    assert output.with_name("result.png").read_bytes().startswith(b"\x89PNG")
    assert f"| full | 576 | {result['rows'][0]['seconds']:.0f} | {result['rows'][0]['ratio']['held']:.3f} |" in table
