"""The report's plots of a manifest, as plotly's data and layout; the page has colours for light and dark."""

import html
from typing import Any

from eigenslice.errors import printable

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


def label(text: str) -> str:
    """A name as plotly, which reads some HTML, shows it."""
    return html.escape(printable(text), quote=False)


def parameters_by_role(manifest: dict[str, Any]) -> Figure:
    """Bars of the parameters in each role, dense and sliced."""
    sizes = manifest["parameters"]
    before, after = sizes.get("dense_by_role") or {}, sizes["by_role"]
    roles = list(dict.fromkeys([*before, *after]))
    pairs = (("dense", before, "c0"), ("sliced", after, "c1"))
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": [label(role) for role in roles],
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
    lines = [_eigenvalues(number, sites) for number in range(len(sites))]
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


def _eigenvalues(number: int, sites: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of a site: its eigenvalues over their rank."""
    site, alone = sites[number], len(sites) == 1
    points = {int(rank): value for rank, value in site["eigenvalues"].items()}
    shown = {rank: value for rank, value in points.items() if value > 0}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label(site["site"]),
        "x": list(shown),
        "y": list(shown.values()),
        "line": {"width": 2 if alone else 1, "color": "c0" if alone else _depth(number, sites)},
        "hovertemplate": f"{label(site['site'])}, rank %{{x}}: %{{y:.2e}}<extra></extra>",
    }


def _depth(number: int, sites: list[Any]) -> str:
    """Blue, stronger with depth; readable on light and dark."""
    return f"rgba(58, 124, 196, {0.25 + 0.75 * number / max(1, len(sites) - 1):.2f})"


def energy(manifest: dict[str, Any]) -> Figure | None:
    """The share of energy kept at each site, or behind each block; nothing where only one number is known."""
    sites = [site for site in manifest["spectra"] if "energy_kept" in site]
    if len(sites) < 2:
        blocks = [entry for entry in manifest.get("refit_errors") or [] if "energy_kept" in entry]
        sites = [entry | {"site": f"block {entry['block']}"} for entry in blocks]
    if len(sites) < 2:
        return None
    bars = {
        "type": "bar",
        "x": [label(site["site"]) for site in sites],
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
        "Squared difference of the sliced stream from the dense one behind each block, as a share of its energy.",
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
