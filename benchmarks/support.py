"""The matrix in docs/support.md: every cell is run on tiny random models, none is filled in by hand.

    python benchmarks/support.py [--old .venv-transformers4/bin/python] [TYPE ...]

Results go to benchmarks/results/support.json; types that are named are run again, the others keep their results. The
checks are those of the tests: the full width against transformers' dense model (float32, within 1e-4 of the largest
logit), slices against an independent implementation in float64 (within 1e-3).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import load_file
from tests import reference, tiny
from tests.conftest import load, relative

from eigenslice import CalibrationOptions, SliceOptions, slice_model
from eigenslice.arch import TABLES
from eigenslice.measuring import HEAD_WEIGHT

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/support.json", ROOT / "docs/support.md"
COLUMNS = {
    "saved": "saved as",
    "exact": "exact at full width",
    "custom": "exact, custom class",
    "per_block": "exact, per-block",
    "tied": "stays tied",
    "padding": "batch with padding",
    "cache": "KV cache",
    "sliced": "slice is the reference's",
    "sliced_per_block": "per-block slice is the reference's",
    "neurons": "MLP neurons cut",
    "old": "transformers 4.57",
    "llama.cpp": "llama.cpp",
    "vllm": "vLLM",
    "openvino": "OpenVINO",
}
NOT_RUN = "not run"
WIDTH, IDS = 20, tiny.random_ids(2, 20, seed=5)
OLD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, __version__
assert __version__.startswith("4.57"), __version__
ids = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.save(model(ids).logits, folder + "/old.pt")
    except Exception as error:
        open(folder + "/old.txt", "w").write(type(error).__name__ + ": " + str(error).strip())
"""
"""Runs in transformers 4.57: logits, or what went wrong, of some folders."""


def near(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """A cell for logits that should be within 1e-4 of the largest one."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    return "yes" if error <= 1e-4 else f"no: off by {error:.1e}"


class Runner:
    """One case: its dense model and what is made of it, in a temporary folder."""

    def __init__(self, case: str, folder: Path) -> None:
        self.case, self.folder = tiny.CASES[case], folder
        self.table = TABLES[self.case.model_type]
        self.dense = tiny.save(self.case.build(), folder / "dense")
        self.calibration = tiny.calibration_file(folder)
        self.made: dict[str, Any] = {}

    def slice(self, **options: Any) -> Any:
        """The result of a run; the same options run once."""
        key = json.dumps(options, sort_keys=True)
        if key not in self.made:
            data = CalibrationOptions(data=str(self.calibration))
            output = self.folder / f"out-{len(self.made)}"
            self.made[key] = slice_model(
                SliceOptions(model=str(self.dense), output=output, calibration=data, **options)
            )
        return self.made[key]

    @staticmethod
    def logits(folder: Path, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return load(folder)(ids, **kwargs).logits

    def saved(self) -> str:
        return self.slice(width=24).manifest["model_type"].replace("eigenslice", "custom")

    def exact(self) -> str:
        return near(self.logits(self.slice(width=tiny.WIDTH).output), self.logits(self.dense))

    def custom(self) -> str:
        return near(self.logits(self.slice(width=tiny.WIDTH, form="custom").output), self.logits(self.dense))

    def per_block(self) -> str:
        return near(self.logits(self.slice(width=tiny.WIDTH, basis="per-block").output), self.logits(self.dense))

    def tied(self) -> str:
        if not load(self.dense).config.tie_word_embeddings:
            return "untied"
        return "yes" if self.slice(width=tiny.WIDTH).manifest["tied"] else "no"

    def padding(self) -> str:
        mask = torch.ones_like(IDS)
        mask[1, :6] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        ids, real = IDS.masked_fill(mask == 0, 0), mask.bool()
        actual = self.logits(self.slice(width=tiny.WIDTH).output, ids, **inputs)[real]
        return near(actual, self.logits(self.dense, ids, **inputs)[real])

    def cache(self) -> str:
        model, past, steps = load(self.slice(width=24).output), None, []
        with torch.no_grad():
            for i in range(IDS.shape[1]):
                output = model(IDS[:, i : i + 1], past_key_values=past, use_cache=True)
                past = output.past_key_values
                steps.append(output.logits)
            return near(torch.cat(steps, dim=1), model(IDS).logits)

    def _against(self, expected: Callable[[Any, torch.Tensor, int], torch.Tensor], **options: Any) -> str:
        result = self.slice(width=WIDTH, **options)
        zero_sum = self.table.norm == "layer" and (result.manifest["form"] == "stock" or bool(self.table.mlp.stacked))
        model = reference.load_wide(self.dense, self.case.widest)
        tokens = load_file(self.calibration)["calibration"]
        error = relative(self.logits(result.output), expected(model, tokens, WIDTH - zero_sum))
        return "yes" if error <= 1e-3 else f"no: off by {error:.1e}"

    def sliced(self) -> str:
        if self.case.tied and self.table.norm == "layer":
            return NOT_RUN  # the reference has no tied embeddings behind LayerNorms
        return self._against(
            lambda model, tokens, width: reference.global_logits(
                model, tokens, IDS, width, HEAD_WEIGHT, self.case.tied
            ),
            refit=False,
        )

    def sliced_per_block(self) -> str:
        return self._against(
            lambda model, tokens, width: reference.per_block_logits(model, tokens, IDS, width, self.table.one_width),
            basis="per-block",
        )

    def neurons(self) -> str:
        if not self.table.mlp.neurons:
            return "none"
        result = self.slice(width=24, neurons=40)
        model, plan = load(result.output), result.manifest["plan"]
        sizes = sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())
        right = plan["neurons"] == 40 and sizes == result.manifest["parameters"]["stored"]
        return "yes" if right and torch.isfinite(self.logits(result.output)).all() else "no"


def run_case(case: str, folder: Path) -> tuple[dict[str, str], Path | None]:
    """Every column's result for one case, but transformers 4.57's; and where its stock result is."""
    row: dict[str, str] = {}
    runner = Runner(case, folder)
    for column in COLUMNS:
        check = getattr(runner, column, None)
        try:
            row[column] = check() if check else NOT_RUN
        except Exception as error:  # whatever a model raises is the cell's content
            row[column] = f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    stock = row["saved"] not in ("custom", NOT_RUN) and not row["saved"].startswith("no")
    return row, runner.slice(width=24).output if stock else None


def run_old(python: str, folders: list[Path], ids: Path) -> list[str]:
    """Whether each folder's model has the same logits in transformers 4.57."""
    torch.save(IDS, ids)
    subprocess.run([python, "-c", OLD, ids, *folders], check=True, capture_output=True)
    cells = []
    for folder in folders:
        if (folder / "old.txt").is_file():
            text = (folder / "old.txt").read_text()
            unknown = "does not recognize this architecture" in text
            cells.append("no such type" if unknown else f"no: {' '.join(text.split())[:110]}")
        else:
            cells.append(near(torch.load(folder / "old.pt", weights_only=True), Runner.logits(folder)))
    return cells


def page(results: dict[str, dict[str, str]]) -> str:
    """The Markdown of docs/support.md."""
    lines = [
        "# What is supported",
        "",
        "Made by `python benchmarks/support.py` from runs on tiny random models; no cell is filled in by hand. A type",
        "has a row for each variant that was run. *untied*: the embeddings of this variant aren't tied. *none*: the",
        "table has no neurons to cut. *not run*: nobody has tried, which includes what needs another program.",
        "transformers 4.57 gets the stock result, at 24 of 32 numbers, and, where that fails, the dense model as",
        "transformers 5 saves it.",
        "",
        "| variant | type | " + " | ".join(COLUMNS.values()) + " |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    notes: list[str] = []
    for case in tiny.CASES:
        if case not in results:
            continue
        cells = []
        for column in COLUMNS:
            cell = results[case].get(column, NOT_RUN)
            if cell.startswith("no: "):
                notes.append(f"{len(notes) + 1}. {case}, {COLUMNS[column]}: {cell[4:]}")
                cell = f"no ({len(notes)})"
            cells.append(cell)
        lines.append(f"| {case} | `{tiny.CASES[case].model_type}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types to run; all if none is named")
    parser.add_argument("--old", help="a Python with transformers 4.57")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as root:
        stock: dict[str, Path] = {}
        for case in tiny.CASES:
            if not options.types or tiny.CASES[case].model_type in options.types:
                (folder := Path(root) / case).mkdir()
                results[case], output = run_case(case, folder)
                print(case, {column: cell for column, cell in results[case].items() if cell not in ("yes", NOT_RUN)})
                if output:
                    stock[case] = output
        if options.old and stock:
            ids = Path(root) / "ids.pt"
            cells = run_old(options.old, list(stock.values()), ids)
            dense = run_old(options.old, [Path(root) / case / "dense" for case in stock], ids)
            for case, cell, without in zip(stock, cells, dense, strict=True):
                also = cell.startswith("no: ") and without.startswith("no: ")
                results[case]["old"] = cell + (" (and so does the dense model)" if also else "")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
