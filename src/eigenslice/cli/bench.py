"""`eigenslice bench`."""

import json
from typing import Any

from rich.table import Table

from eigenslice.cli.commands import Given
from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Compared, Quiet
from eigenslice.options.benchmark import BenchOptions


def bench(models: Compared, given: Given[BenchOptions], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Speed, memory and size of models side by side: medians, and the lowest and highest run."""
    from eigenslice.evaluation.speed import bench as run
    from eigenslice.report.measured import short_names

    options = given.options()
    with progress_bar(quiet) as progress:
        result = run(models, options, progress)
    if as_json:
        output.print_json(json.dumps(result))
        return
    names = short_names([row["model"] for row in result["models"]])
    table = Table("", *(names[row["model"]] for row in result["models"]))
    for label, cell in ROWS.items():
        table.add_row(label, *(cell(row) for row in result["models"]))
    output.print(table)
    environment = result["environment"]
    dtypes = ", ".join(dict.fromkeys(environment["dtypes"]))
    output.print(
        f"{options.batch} x {options.prompt} tokens read, {options.new} generated; "
        f"median of {options.runs} interleaved runs (lowest to highest); "
        f"{environment['device']}, {environment['threads']} threads, {dtypes}. "
        "Ideal: the speed-up that the saved operations (prefill) or bytes (decode) allow; in brackets the share of "
        "that gain that is reached.",
        highlight=False,
        soft_wrap=True,
    )


def _rate(phase: str) -> Any:
    def cell(row: dict[str, Any]) -> str:
        spread = row[phase]
        return f"{spread['median']:.1f} ({spread['low']:.1f} to {spread['high']:.1f})"

    return cell


def _speedup(phase: str) -> Any:
    def cell(row: dict[str, Any]) -> str:
        if "speedup" not in row:
            return ""
        speedup = row["speedup"][phase]
        share = "" if speedup["share"] is None else f" ({100 * speedup['share']:.0f} %)"
        return f"x{speedup['measured']:.2f}, ideal x{speedup['ideal']:.2f}{share}"

    return cell


def _first(row: dict[str, Any]) -> str:
    spread = row["first_token"]
    return f"{1000 * spread['median']:.1f} ms ({1000 * spread['low']:.1f} to {1000 * spread['high']:.1f})"


def _mib(field: str) -> Any:
    return lambda row: "" if row[field] is None else f"{row[field] / 2**20:.1f} MiB"


ROWS = {
    "parameters": lambda row: f"{row['parameters']:,}",
    "weights on disk": _mib("disk_bytes"),
    "peak memory": _mib("peak_bytes"),
    "time to first token": _first,
    "prefill, tokens/s": _rate("prefill"),
    "  speed-up": _speedup("prefill"),
    "decode, tokens/s": _rate("decode"),
    "  speed-up ": _speedup("decode"),
}
