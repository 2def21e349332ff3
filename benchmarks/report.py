"""The results of quality.py as a table and a chart."""

from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Rows in Markdown: ratio of perplexity, KL and top-1 agreement for each text, and the mean ratio."""
    texts = list(result["tests"])
    head = ["method", "size", "kept", "plan"]
    head += [f"{text} {kind}" for text in texts for kind in ("ratio", "KL", "top-1")]
    head += ["mean ratio", "seconds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in result["rows"]:
        if "error" in row:
            cells = [row["method"], f"{100 * row['size']:g} %", "-", row["error"].replace("|", "/")]
            lines.append(_line([*cells, *["-"] * (len(head) - len(cells))]))
            continue
        cells = [row["method"], f"{100 * row['size']:g} %", _percent(row["kept"]), row["plan"]]
        for text in texts:
            scores = row["tests"][text]
            broken = scores["ratio"] is None
            cells += ["-"] * 3 if broken else [_ratio(scores["ratio"]), f"{scores['kl']:.3f}", _percent(scores["top1"])]
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        mean = "-" if row["ratio"] is None else f"**{_ratio(row['ratio'])}**"
        lines.append(_line([*cells, mean, seconds]))
    return heading(result) + "\n" + "\n".join(lines) + "\n"


def heading(result: dict[str, Any]) -> str:
    """What was measured on what, in sentences."""
    calibration = result["calibration"]
    data = calibration["data"]
    named = data if isinstance(data, str) else ", ".join(f"{part['data']} ({part['sequences']})" for part in data)
    tests = "; ".join(
        f"{name}: {test['data']}, {test['predicted']} predicted tokens, dense perplexity {test['perplexity']:.2f}"
        + (" (**calibrated on this very text**)" if test["calibrated_on"] else "")
        for name, test in result["tests"].items()
    )
    return (
        f"{result['model']}, {result['parameters'] / 1e6:.1f} M parameters, evaluated in {result['dtype']}. "
        f"Calibrated on {calibration['sequences']} sequences of {calibration.get('seqlen', '?')} tokens: {named}.\n\n"
        f"Tested on {tests}.\n\n"
        "Ratio: perplexity over the dense model's. KL: KL(dense ‖ sliced), nats per token. Top-1: share of tokens "
        "whose most likely prediction is the dense model's. Mean: geometric, over the texts.\n" + _note(result)
    )


def _note(result: dict[str, Any]) -> str:
    """What eigenslice calibrates on beside the given text."""
    if not any(row["method"].startswith("ours") for row in result["rows"]):
        return ""
    return (
        "\nours, ours-custom: the defaults, with half as many sequences that the model wrote itself; -quarter: a "
        "quarter as many (--own-text 0.25); -given: the given text and random tokens only (--own-text 0).\n"
    )


def chart(result: dict[str, Any], path: Path) -> None:
    """Mean ratio of perplexity over the share of parameters kept, one line a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    methods = dict.fromkeys(row["method"] for row in result["rows"])
    for method, marker in zip(methods, "osD^vP*X" * len(methods), strict=False):
        rows = [row for row in result["rows"] if row["method"] == method and "error" not in row]
        points = sorted((100 * row["kept"], row["ratio"]) for row in rows if row["ratio"] is not None)
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=method)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter("")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("parameters kept, %")
    axes.set_ylabel("perplexity / dense, mean of " + ", ".join(result["tests"]))
    axes.set_title(result["model"])
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.2e}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
