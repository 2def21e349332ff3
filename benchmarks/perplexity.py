"""Perplexity and stored size of sliced models, by method and size, as JSON and a table.

    python benchmarks/perplexity.py MODEL --calibration TEXT --test TEXT -o benchmarks/results/NAME

Each method slices MODEL anew and is measured on the same windows as the dense model. Perplexity is token-weighted
over all predicted tokens (eigenslice.evaluate); "kept" is stored parameters over the dense model's, tied weights
once, shortcuts included. Time and memory are this process's: slicing alone, and the peak so far.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from eigenslice import CalibrationOptions, SliceOptions, __version__, evaluate, slice_model

METHODS: dict[str, dict[str, Any]] = {
    "global, keep 0.90": {"keep": 0.90},
    "global, keep 0.85": {"keep": 0.85},
    "global, keep 0.75": {"keep": 0.75},
    "global, keep 0.75, no refit": {"keep": 0.75, "refit": False},
    "global, slicing 25 %, untied": {"slicing": 0.25, "untie": True},
    "per-block, slicing 25 % (the paper)": {"slicing": 0.25, "basis": "per-block"},
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, the dense model first."""
    length = {"samples": arguments.samples, "seqlen": arguments.seqlen}
    calibration = CalibrationOptions(data=arguments.calibration, seed=arguments.seed, **length)
    test = CalibrationOptions(data=arguments.test, **length)
    dense = evaluate(arguments.model, test)
    rows: list[dict[str, Any]] = [{"method": "dense", "kept": 1.0, "perplexity": dense.perplexity, "ratio": 1.0}]
    print(rows[-1], flush=True)
    for method, options in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "sliced"
            start = time.perf_counter()
            result = slice_model(SliceOptions(model=arguments.model, output=output, calibration=calibration, **options))
            seconds = time.perf_counter() - start
            measured = evaluate(str(output), test)
        manifest = result.manifest
        rows.append(
            {
                "method": method,
                "kept": manifest["parameters"]["kept"],
                "parameters": manifest["parameters"]["stored"],
                "width": manifest["site_widths"][0],
                "saved_as": manifest["model_type"],
                "perplexity": measured.perplexity,
                "ratio": measured.perplexity / dense.perplexity,
                "slicing_seconds": round(seconds, 1),
                "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
        print(rows[-1], flush=True)
    return {
        "model": Path(arguments.model).name,
        "calibration": manifest["calibration"],
        "test": dense.data | {"predicted": dense.tokens},
        "versions": {
            "eigenslice": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| method | parameters kept | width | saved as | perplexity | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        width, saved = row.get("width", "-"), row.get("saved_as", "-")
        lines.append(
            f"| {row['method']} | {100 * row['kept']:.1f} % | {width} | {saved} | {row['perplexity']:.2f} | "
            f"{row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a hub id or a .gguf file")
    parser.add_argument("--calibration", default="wikitext2", help="as eigenslice slice --calibration")
    parser.add_argument("--test", default="wikitext2", help="as eigenslice eval --data")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="without suffix: .json and .md are written")
    arguments = parser.parse_args()
    result = measure(arguments)
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
