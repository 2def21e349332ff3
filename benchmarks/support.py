"""The matrix in docs/support.md: every cell is run on tiny random models, none is filled in by hand.

    python benchmarks/support.py [--old .venv-transformers4/bin/python] [--vllm .venv-vllm/bin/python] [TYPE ...]

Results go to benchmarks/results/support.json after each case. Types and columns that aren't named keep their results.
Columns of other programs need --old and --vllm, and the packages xllamacpp and openvino in this Python; without them
they are "not run". The checks are those of the tests: the full width against transformers' dense model (float32, within
1e-4 of the largest logit), slices against an independent implementation in float64 (within 1e-3), other programs
against transformers (within 1e-4; vLLM's log-probabilities within 1e-3 nats).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import load_file
from tests import reference, tiny
from tests.compat import check_vllm
from tests.export import models
from tests.results import load, relative

from eigenslice import CalibrationOptions, SliceOptions, slice_model
from eigenslice.arch import TABLES
from eigenslice.measure.importance import HEAD_WEIGHT
from families_table import section
from support_cuts import Cuts
from support_cuts import section as cuts_section
from support_runtimes import (
    IDS,
    NOT_RUN,
    attempt,
    both,
    check_llama_cpp,
    check_old_with,
    check_openvino,
    check_vllm_with,
    logits,
    missing,
    near,
)
from support_types import head

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/support.json", ROOT / "docs/support.md"
FAMILIES = ROOT / "benchmarks/results/families.json"
"""What families.py has measured; without this file the page has no section on it."""
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
WIDTH = 20


class Runner:
    """One case: its dense model and what is made of it, in a temporary folder."""

    def __init__(self, case: str, folder: Path, pythons: dict[str, str | None]) -> None:
        self.case, self.folder, self.pythons = tiny.CASES[case], folder, pythons
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

    def saved(self) -> str:
        return self.slice(width=24).manifest["model_type"].replace("eigenslice", "custom")

    def exact(self) -> str:
        return near(logits(self.slice(width=tiny.WIDTH).output), logits(self.dense))

    def custom(self) -> str:
        return near(logits(self.slice(width=tiny.WIDTH, form="custom").output), logits(self.dense))

    def per_block(self) -> str:
        return near(logits(self.slice(width=tiny.WIDTH, basis="per-block").output), logits(self.dense))

    def tied(self) -> str:
        if not load(self.dense).config.tie_word_embeddings:
            return "untied"
        return "yes" if self.slice(width=tiny.WIDTH).manifest["tied"] else "no"

    def padding(self) -> str:
        mask = torch.ones_like(IDS)
        mask[1, :6] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        ids, real = IDS.masked_fill(mask == 0, 0), mask.bool()
        actual = logits(self.slice(width=tiny.WIDTH).output, ids, **inputs)[real]
        return near(actual, logits(self.dense, ids, **inputs)[real])

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
        error = relative(logits(result.output), expected(model, tokens, WIDTH - zero_sum))
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
        if not self.table.mlp.can_cut_neurons:
            return "none"
        count = 16 if self.table.mlp.stacked else 40  # some experts have 24
        result = self.slice(width=24, neurons=count)
        model, plan = load(result.output), result.manifest["plan"]
        sizes = sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())
        right = plan["neurons"] == count and sizes == result.manifest["parameters"]["stored"]
        return "yes" if right and torch.isfinite(logits(result.output)).all() else "no"

    def again(self, name: str, width: int, rows: int, tokenizer: Any = None, **config: Any) -> tuple[Path, Path]:
        """The slice, and the dense model, of the case with other numbers in its config."""
        folder = self.folder / name
        folder.mkdir()
        if tokenizer:
            tokenizer.save_pretrained(folder / "dense")
        dense = tiny.save(
            tiny.tiny_model(self.case.model_type, self.case.config | self.case.extra | config), folder / "dense"
        )
        data = CalibrationOptions(data=str(tiny.calibration_file(folder, rows)))
        sliced = slice_model(
            SliceOptions(model=str(dense), output=folder / "sliced", width=width, calibration=data)
        ).output
        return sliced, dense

    def old(self) -> str:
        if not self.pythons["old"] or self.saved() == "custom":
            return NOT_RUN
        return both(check_old_with(self.pythons["old"]), self.slice(width=24).output, self.dense)

    def llama_cpp(self) -> str:
        made = self.again("gguf", 24, 12, models.tokenizer(), vocab_size=models.VOCABULARY)
        return both(check_llama_cpp, *made)

    def vllm(self) -> str:
        if not self.pythons["vllm"]:
            return NOT_RUN
        made = self.again("vllm", check_vllm.WIDTH, check_vllm.CALIBRATION_ROWS, **check_vllm.wide(self.case))
        return both(check_vllm_with(self.pythons["vllm"]), *made)

    def openvino(self) -> str:
        return both(check_openvino, self.slice(width=24).output, self.dense)


def run_case(runner: Runner, columns: list[str]) -> dict[str, str]:
    """These columns' results for one case."""
    return {
        column: NOT_RUN if missing(column) else attempt(getattr(runner, column.replace(".", "_"))) for column in columns
    }


def page(results: dict[str, dict[str, str]]) -> str:
    """The Markdown of docs/support.md."""
    lines = [
        head(results),
        *cuts_section(results),
        *([*section(json.loads(FAMILIES.read_text())), ""] if FAMILIES.is_file() else []),
        "## Matrix",
        "",
        "`python benchmarks/support.py` makes this table from runs on tiny random models. No cell is filled in by",
        "hand. A type has a row for each variant that was run.",
        "",
        "- *untied*: the embeddings of this variant aren't tied.",
        "- *none*: the table has no neurons to cut.",
        "- *not run*: nobody has tried. Columns of other programs need this program.",
        "- *not written*: `eigenslice export` refuses this type or, where there is a number, this variant.",
        "- transformers 4.57 gets the stock result at hidden size 24 of 32.",
        "- OpenVINO gets the stock result or the custom one: a prompt at once, another prompt token by token.",
        "- llama.cpp gets a result of hidden size 24 from a model with a tokenizer that llama.cpp has.",
        f"- vLLM gets a result of hidden size {check_vllm.WIDTH} of {check_vllm.WIDE['hidden_size']}.",
        "",
        "Where one of these programs fails, the dense model as transformers 5 saves it is tried, too.",
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
            cell, colon, note = cell.partition(": ")
            if colon:
                notes.append(f"{len(notes) + 1}. {case}, {COLUMNS[column]}: {note}")
                cell = f"{cell} ({len(notes)})"
            cells.append(cell)
        lines.append(f"| {case} | `{tiny.CASES[case].model_type}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types to run; all if none is named")
    parser.add_argument("--old", help="a Python with transformers 4.57")
    parser.add_argument("--vllm", help="a Python with vLLM")
    parser.add_argument("--columns", help="columns to run, with commas between them; the others keep their results")
    parser.add_argument("--first", action="store_true", help="only the first variant of each type")
    parser.add_argument(
        "--page", action="store_true", help="run nothing: write the page from the results that are here"
    )
    options = parser.parse_args()
    columns = options.columns.split(",") if options.columns else [*COLUMNS, "cuts"]
    for column in columns:
        if column not in (*COLUMNS, "cuts"):
            parser.error(f"--columns {column}: none of {', '.join(COLUMNS)}, cuts")
        if options.columns and (missing(column) or not getattr(options, column, True)):
            parser.error(f"--columns {column}: the program isn't here, or --{column} doesn't say where")
    pythons = {"old": options.old, "vllm": options.vllm}
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.page:
        PAGE.write_text(page(results))
        return
    first = {variant.model_type: case for case, variant in reversed(tiny.CASES.items())}
    for case, variant in tiny.CASES.items():
        if options.types and variant.model_type not in options.types:
            continue
        if options.first and case != first[variant.model_type]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cells = run_case(Runner(case, Path(folder), pythons), [name for name in columns if name != "cuts"])
        if "cuts" in columns and case == first[variant.model_type]:
            with tempfile.TemporaryDirectory() as folder:
                cells |= Cuts(case, Path(folder)).cells()
        results[case] = results.get(case, {}) | cells
        print(case, {column: cell for column, cell in cells.items() if cell not in ("yes", NOT_RUN)}, flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
