"""The report's plots of measurements: perplexity, tasks, speed."""

from typing import Any

from eigenslice.errors import OptionsError
from eigenslice.report.figures import Figure, figure, label


def perplexities(content: Any, sizes: dict[str, float]) -> Figure:
    """Perplexity over size, of `eval --json` or of benchmarks/quality.py.

    Args:
        content: The JSON.
        sizes: Percent of parameters kept of models, by name, where that is known.

    Raises:
        OptionsError: it is neither.
    """
    try:
        if isinstance(content, dict):
            return _of_quality(content)
        return _of_eval(content, sizes)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _unreadable("--perplexity", "`eigenslice eval --json` or benchmarks/quality.py") from error


def _of_quality(content: dict[str, Any]) -> Figure:
    lines = []
    texts = list(content["tests"])
    methods = dict.fromkeys(row["method"] for row in content["rows"] if "error" not in row)
    for text, dash in zip(texts, ("solid", "dash", "dot", "dashdot") * len(texts), strict=False):
        for number, method in enumerate(methods):
            rows = [row for row in content["rows"] if row["method"] == method and "error" not in row]
            points = sorted((100 * row["kept"], row["tests"][text]["ratio"]) for row in rows)
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": label(f"{method}, {text}"),
                    "x": [x for x, y in points if y is not None],
                    "y": [y for x, y in points if y is not None],
                    "line": {"color": f"c{number}", "dash": dash},
                    "hovertemplate": f"{label(f'{method}, {text}')}: %{{y:.2f}} at %{{x:.1f}} %<extra></extra>",
                }
            )
    return figure(
        "perplexity",
        "Perplexity over size",
        "",
        lines,
        x="parameters kept, %",
        y="perplexity / dense",
        yaxis={"type": "log"},
    )


def _of_eval(rows: list[dict[str, Any]], sizes: dict[str, float]) -> Figure:
    texts = list(dict.fromkeys(row["data"]["data"] for row in rows))
    over_size = all(row["model"] in sizes for row in rows)
    names = _labels([row["model"] for row in rows])
    traces: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        of_text = [row for row in rows if row["data"]["data"] == text]
        trace = {
            "name": label(text),
            "y": [row["perplexity"] for row in of_text],
            "text": [names[row["model"]] for row in of_text],
            "marker": {"color": f"c{number}", "size": 8} if over_size else {"color": f"c{number}"},
            "hovertemplate": "%{text}: %{y:.2f}<extra></extra>",
        }
        if over_size:  # models of one size, such as before and after training, would be joined by a vertical line
            trace |= {"type": "scatter", "mode": "markers", "x": [sizes[row["model"]] for row in of_text]}
        else:
            trace |= {"type": "bar", "x": [names[row["model"]] for row in of_text], "textposition": "none"}
        traces.append(trace)
    x = "parameters kept, %" if over_size else ""
    return figure("perplexity", "Perplexity" + (" over size" if over_size else ""), "", traces, x=x, y="perplexity")


def tasks(content: Any) -> Figure:
    """Scores of tasks with standard errors, of `eval --tasks --json`.

    Raises:
        OptionsError: it is something else.
    """
    try:
        names = _labels([model["model"] for model in content["models"]])
        bars = [
            {
                "type": "bar",
                "name": names[model["model"]],
                "x": [label(f"{row['task']} ({row['metric']})") for row in model["scores"]],
                "y": [row["value"] for row in model["scores"]],
                "error_y": {"type": "data", "color": "text", "array": [row["stderr"] for row in model["scores"]]},
                "marker": {"color": f"c{number}"},
            }
            for number, model in enumerate(content["models"])
        ]
    except (KeyError, TypeError) as error:
        raise _unreadable("--tasks", "`eigenslice eval --tasks ... --json`") from error
    return figure("tasks", "Tasks", "Error bars: one standard error.", bars, y="score", barmode="group")


def speeds(content: Any) -> list[Figure]:
    """Speed and memory, of `bench --json`.

    Raises:
        OptionsError: it is something else.
    """
    try:
        rows = content["models"]
        names = _labels([row["model"] for row in rows])
        result = [
            figure(
                phase,
                title,
                "",
                [
                    {
                        "type": "bar",
                        "x": [names[row["model"]]],
                        "y": [row[phase]["median"]],
                        "error_y": {
                            "type": "data",
                            "color": "text",
                            "symmetric": False,
                            "array": [row[phase]["high"] - row[phase]["median"]],
                            "arrayminus": [row[phase]["median"] - row[phase]["low"]],
                        },
                        "marker": {"color": f"c{number}"},
                        "hovertemplate": "%{x}: %{y:.1f} tokens/s<extra></extra>",
                    }
                    for number, row in enumerate(rows)
                ],
                y="tokens per second",
                showlegend=False,
            )
            for phase, title in (("prefill", "Reading the prompt"), ("decode", "Generating"))
        ]
        memory = [(n, row) for n, row in enumerate(rows) if row["peak_bytes"]]
    except (KeyError, TypeError) as error:
        raise _unreadable("--bench", "`eigenslice bench ... --json`") from error
    if memory:
        bars = [
            {
                "type": "bar",
                "x": [names[row["model"]]],
                "y": [row["peak_bytes"] / 2**20],
                "marker": {"color": f"c{number}"},
                "hovertemplate": "%{x}: %{y:.0f} MiB<extra></extra>",
            }
            for number, row in memory
        ]
        result.append(figure("memory", "Peak memory", "", bars, y="MiB", showlegend=False))
    return result


def short_names(names: list[str]) -> dict[str, str]:
    """The last part of each path, where that tells the models apart."""
    last = {name: name.rstrip("/").rpartition("/")[2] for name in names}
    return last if len(set(last.values())) == len(last) else {name: name for name in names}


def _labels(names: list[str]) -> dict[str, str]:
    return {name: label(short) for name, short in short_names(names).items()}


def _unreadable(option: str, allowed: str) -> OptionsError:
    return OptionsError(
        f"{option}: this JSON is not what it should be", allowed=f"the output of {allowed}", next_step="write it again"
    )
