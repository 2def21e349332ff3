"""The report's plots, as plotly's data and layout; colours are the page's, which knows light from dark."""

from typing import Any

from eigenslice.errors import OptionsError

Figure = dict[str, Any]
"""`id`, `title`, `note`, and plotly's `data` and `layout`. A colour "c0", "c1", ... is the page's."""
BLOCK_SITES = 60
"""More bars than this have no room for names."""


def figure(name: str, title: str, note: str, data: list[dict[str, Any]], **layout: Any) -> Figure:
    """A plot; `layout` is plotly's, with axes' titles as plain strings in `x` and `y`."""
    x, y = layout.pop("x", ""), layout.pop("y", "")
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for axis in axes:
        axes[axis] |= layout.pop(axis, {})
    return {"id": name, "title": title, "note": note, "data": data, "layout": axes | layout}


def parameters_by_role(manifest: dict[str, Any]) -> Figure:
    """Bars of the parameters in each role, dense and sliced."""
    sizes = manifest["parameters"]
    before, after = sizes.get("dense_by_role", {}), sizes["by_role"]
    roles = list(dict.fromkeys([*before, *after]))
    pairs = (("dense", before, "c0"), ("sliced", after, "c1"))
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": roles,
            "y": [values.get(role, 0) for role in roles],
            "marker": {"color": color},
            "hovertemplate": f"%{{x}}, {name}: %{{y:,}}<extra></extra>",
        }
        for name, values, color in pairs
        if values
    ]
    return figure("roles", "Parameters by role", "", bars, y="parameters", barmode="group")


def spectra(manifest: dict[str, Any]) -> Figure | None:
    """Each site's eigenvalues over their rank, with the cut."""
    sites = [site for site in manifest["spectra"] if site.get("eigenvalues")]
    if not sites:
        return None
    lines = []
    for number, site in enumerate(sites):
        points = {int(rank): value for rank, value in site["eigenvalues"].items()}
        shown = {rank: value for rank, value in points.items() if value > 0}
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": site["site"],
                "x": list(shown),
                "y": list(shown.values()),
                "line": {
                    "width": 2 if len(sites) == 1 else 1,
                    "color": "c0" if len(sites) == 1 else _depth(number, sites),
                },
                "hovertemplate": f"{site['site']}, rank %{{x}}: %{{y:.2e}}<extra></extra>",
            }
        )
    cuts = sorted({site["width"] for site in sites})
    shapes = [
        {
            "type": "line",
            "x0": cut,
            "x1": cut,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": "c1", "dash": "dash"},
        }
        for cut in cuts
    ]
    lines.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "cut",
            "x": [site["width"] for site in sites],
            "y": [site["eigenvalues"].get(str(site["width"])) for site in sites],
            "marker": {"color": "c1", "size": 7},
            "hovertemplate": "cut at %{x}<extra></extra>",
        }
    )
    note = "Each eigenvalue of the stream's second moment as a share of all of them; what is right of the dashed line "
    note += "was cut."
    if len(sites) > 1:
        note += f" {len(sites)} sites, from the first (pale) to the last (strong)."
    return figure(
        "spectrum",
        "Spectrum",
        note,
        lines,
        x="rank",
        y="share of the energy",
        xaxis={"type": "log", "tickvals": [n * 10**k for k in range(6) for n in (1, 2, 5)]},
        yaxis={"type": "log", "exponentformat": "power", "dtick": 1},
        shapes=shapes,
        showlegend=False,
    )


def _depth(number: int, sites: list[Any]) -> str:
    """Blue, stronger with depth; readable on light and dark."""
    return f"rgba(58, 124, 196, {0.25 + 0.75 * number / max(1, len(sites) - 1):.2f})"


def energy(manifest: dict[str, Any]) -> Figure | None:
    """The share of energy kept at each site; nothing where all sites share one number."""
    sites = [site for site in manifest["spectra"] if "energy_kept" in site]
    if len(sites) < 2:
        return None
    bars = {
        "type": "bar",
        "x": [site["site"] for site in sites],
        "y": [100 * site["energy_kept"] for site in sites],
        "marker": {"color": "c0"},
        "hovertemplate": "%{x}: %{y:.2f} %<extra></extra>",
    }
    low = min(100 * site["energy_kept"] for site in sites)
    axis = {"range": [max(0.0, low - 0.1 * (100 - low) - 0.5), 100]}
    note = "Share of the stream's energy in the directions that are kept. The axis doesn't start at 0."
    return figure(
        "energy",
        "Energy kept",
        note,
        [bars],
        y="%",
        yaxis=axis,
        xaxis={"showticklabels": len(sites) <= BLOCK_SITES, "nticks": 12},
    )


def refit_errors(manifest: dict[str, Any]) -> Figure | None:
    """The error of each block after its layers were fitted, where the manifest has it."""
    errors = manifest.get("refit_errors")
    if not errors:
        return None
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [entry["block"] for entry in errors],
        "y": [entry["error"] for entry in errors],
        "line": {"color": "c0"},
        "hovertemplate": "block %{x}: %{y:.4f}<extra></extra>",
    }
    return figure(
        "refit",
        "Error after refitting",
        "Relative squared error of each block's stream, beside the dense one.",
        [line],
        x="block",
        y="error",
        yaxis={"rangemode": "tozero"},
    )


def training(manifest: dict[str, Any]) -> Figure | None:
    """Losses of the recovery fine-tuning."""
    section = manifest.get("finetune")
    if not section:
        return None
    kinds = (("training", section["loss"], "c0"), ("held out", section["held_out_loss"], "c1"))
    lines = [
        {
            "type": "scatter",
            "mode": "lines" if name == "training" else "lines+markers",
            "name": name,
            "x": [step for step, _ in points],
            "y": [loss for _, loss in points],
            "line": {"color": color},
        }
        for name, points, color in kinds
    ]
    return figure("training", "Recovery fine-tuning", "", lines, x="step", y="loss, nats per token")


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
                    "name": f"{method}, {text}",
                    "x": [x for x, y in points if y is not None],
                    "y": [y for x, y in points if y is not None],
                    "line": {"color": f"c{number}", "dash": dash},
                    "hovertemplate": f"{method}, {text}: %{{y:.2f}} at %{{x:.1f}} %<extra></extra>",
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
    names = short_names([row["model"] for row in rows])
    traces: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        of_text = [row for row in rows if row["data"]["data"] == text]
        trace = {
            "name": text,
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
        names = short_names([model["model"] for model in content["models"]])
        bars = [
            {
                "type": "bar",
                "name": names[model["model"]],
                "x": [f"{row['task']} ({row['metric']})" for row in model["scores"]],
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
        names = short_names([row["model"] for row in rows])
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


def _unreadable(option: str, allowed: str) -> OptionsError:
    return OptionsError(
        f"{option}: this JSON is not what it should be", allowed=f"the output of {allowed}", next_step="write it again"
    )
