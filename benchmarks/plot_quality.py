"""The picture in the README: perplexity over size, from the measured numbers in benchmarks/results.

python benchmarks/plot_quality.py benchmarks/results/smollm2-135m-mixed-blocks.json -o docs/quality.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

CURVES = {
    "ours-custom": ("eigenslice, custom class", "#0b5fa5", "o"),
    "ours": ("eigenslice, stock checkpoint", "#3fa0e0", "s"),
    "drop-blocks": ("dropping layers (ShortGPT)", "#c0504d", "^"),
    "width-pruning": ("width pruning without rotation", "#7f7f7f", "v"),
    "paper-per-block": ("SliceGPT as published", "#b8860b", "D"),
}
"""Methods of quality.py: what each is called in the picture, its colour and its marker."""
TICKS = (1, 1.5, 2, 3, 5, 10, 30, 100, 300, 1000)


def points(result: dict[str, Any], method: str) -> list[tuple[float, float]]:
    """Share of the parameters kept, in per cent, and ratio of perplexity; sorted by size."""
    rows = [row for row in result["rows"] if row["method"] == method and row.get("ratio") is not None]
    return sorted((100 * row["kept"], row["ratio"]) for row in rows)


def draw(axes: Axes, result: dict[str, Any]) -> None:
    """One line for each method, on a logarithmic axis."""
    for method, (label, colour, marker) in CURVES.items():
        measured = points(result, method)
        ours = method.startswith("ours")
        axes.plot(
            [kept for kept, _ in measured],
            [ratio for _, ratio in measured],
            label=label,
            color=colour,
            marker=marker,
            linewidth=2.5 if ours else 1.3,
            zorder=3 if ours else 2,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("parameters kept, % of the dense model")
    axes.set_ylabel("perplexity, relative to the dense model")
    axes.set_title(f"SmolLM2-135M-Instruct, no training, mean of {len(result['tests'])} texts", fontsize=11)
    axes.grid(True, linewidth=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file that quality.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture to write, .png or .svg")
    options = parser.parse_args()
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot(), json.loads(options.result.read_text(encoding="utf-8")))
    figure.savefig(options.output, dpi=130)


if __name__ == "__main__":
    main()
