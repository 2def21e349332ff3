"""`eigenslice report`: one HTML file that holds everything about a result, and needs nothing else."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenslice._version import __version__
from eigenslice.errors import CheckpointError, OutputError
from eigenslice.options.paths import expanded
from eigenslice.options.reporting import ReportOptions
from eigenslice.report import figures, measured, stated_loss, story, written
from eigenslice.report.json_inputs import read_input
from eigenslice.report.manifest import NAME, read_manifest
from eigenslice.report.samples import Sample, generate
from eigenslice.runtime.durable import write_whole
from eigenslice.runtime.output import check_output, refuse_overlap

Progress = Callable[[str, int, int], None]
MARK = f'<meta name="generator" content="eigenslice {__version__}">'
MARK_START = '<meta name="generator" content="eigenslice'


def report(options: ReportOptions, progress: Progress = lambda stage, done, total: None) -> Path:
    """Write a report; gives its path.

    Raises:
        EigensliceError: no result of eigenslice, JSON of another kind, or a path that can't be written.
    """
    folder = options.folder
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise CheckpointError(
            f"{folder} is no sliced model: it has no {NAME}",
            allowed="a folder that eigenslice slice or eigenslice finetune wrote",
            next_step="check the path",
        )
    _check_path(options.path, [folder, *([expanded(options.generate)] if options.generate else [])])
    perplexity, tasks, writing, bench = (
        read_input(option, getattr(options, option)) for option in ("perplexity", "tasks", "writing", "bench")
    )
    plots = _plots(manifest, folder, perplexity, tasks, bench)
    samples = []
    if options.generate:
        samples = generate(
            [options.generate, str(folder)],
            options.prompts,
            options.new,
            options.device,
            options.trust_remote_code,
            progress,
        )
    page = render(manifest, options.named_folder.absolute().name, plots, bench, Texts(samples, writing))
    write_whole(options.path, page)
    return options.path


def _plots(
    manifest: dict[str, Any], folder: Path, perplexity: Any, tasks: Any, bench: Any
) -> dict[str, list[figures.Figure]]:
    """Figures by section."""
    sizes = _sizes(perplexity, manifest, folder)
    made = {
        "cut": [figures.parameters_by_role(manifest)],
        "spectrum": [figures.spectra(manifest), figures.energy(manifest), figures.refit_errors(manifest)],
        "quality": [
            measured.perplexities(perplexity, sizes) if perplexity is not None else None,
            measured.tasks(tasks) if tasks is not None else None,
        ],
        "speed": measured.speeds(bench) if bench is not None else [],
        "training": [figures.training(manifest)],
    }
    return {section: [plot for plot in plots if plot] for section, plots in made.items()}


def _sizes(perplexity: Any, manifest: dict[str, Any], folder: Path) -> dict[str, float]:
    """Return the percentage of parameters that each measured model keeps, the dense one and the results."""
    sizes = {manifest["source"]["name"]: 100.0, str(folder): 100 * manifest["parameters"]["kept"]}
    for name in [row["model"] for row in perplexity] if isinstance(perplexity, list) else ():
        try:
            other = read_manifest(Path(name)) if Path(name).is_dir() else None
        except (OSError, ValueError, CheckpointError):  # no folder's name, or no result: its size isn't known
            other = None
        if other:
            sizes[name] = 100 * other["parameters"]["kept"]
    return sizes


@dataclass(frozen=True)
class Texts:
    """What models wrote: samples, and the JSON of their figures (None without one)."""

    samples: list[Sample]
    figures: Any

    @property
    def names(self) -> list[str]:
        """Short names of the models with figures."""
        models = [row["model"] for row in self.figures["models"]]
        return [measured.short_names(models)[model] for model in models]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """Rows of their table."""
        return list(written.written_rows(self.figures))


def render(
    manifest: dict[str, Any], name: str, plots: dict[str, list[figures.Figure]], bench: Any, texts: Texts
) -> str:
    """The page's HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("eigenslice.report", "assets"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["short"] = short
    flat = [plot for section in plots.values() for plot in section]
    assets = Path(__file__).with_name("assets")
    return environment.get_template("page.html.jinja").render(
        mark=MARK,
        manifest=manifest,
        name=name,
        source=story.source_name(manifest),
        command=story.slice_command(manifest),
        loading=story.loading_code(manifest, name),
        custom_note="" if manifest["form"] == "stock" else story.custom_note(manifest),
        calibration=story.calibration_text(manifest["calibration"]),
        loss=manifest.get("loss") or {},
        loss_missing=stated_loss.why_not_measured(manifest),
        loss_warning="" if stated_loss.is_older_than_training(manifest) else stated_loss.loss_warning(manifest),
        loss_is_older=stated_loss.is_older_than_training(manifest),
        roles=_roles(manifest["parameters"]),
        neurons=story.neurons_text(manifest["plan"]["neurons"]),
        training_command="\n".join(story.finetune_commands(manifest)),
        trained_on=story.calibration_text(manifest["finetune"]["data"]) if "finetune" in manifest else "",
        plots=plots,
        bench=bench,
        texts=texts,
        writing_note=written.NOTE,
        data=_json(flat),
        style=(assets / "style.css").read_text(encoding="utf-8"),
        script=(assets / "plots.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def short(count: int) -> str:
    """A number of parameters in three digits: 157.6 k, 134.5 M, 6.7 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _roles(sizes: dict[str, Any]) -> list[tuple[Any, int | None, int]]:
    """Role, parameters before (None where an old manifest doesn't say) and after."""
    before, after = sizes.get("dense_by_role"), sizes["by_role"]
    roles = dict.fromkeys([*(before or {}), *after])
    return [(role, None if before is None else before.get(role, 0), after.get(role, 0)) for role in roles]


def _json(values: Any) -> str:
    """JSON that may stand in a script element: without NaN, which browsers refuse, and without a tag's beginning."""
    return json.dumps(_drawable(values), allow_nan=False).replace("<", "\\u003c")


def _drawable(value: Any) -> Any:
    """A value with gaps in the place of numbers that can't be drawn."""
    if isinstance(value, dict):
        return {name: _drawable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_drawable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_path(path: Path, inputs: list[Path]) -> None:
    """Refuse a path that can't be written, before any work. Only a report may be replaced.

    Raises:
        OutputError: the path can't be written, or holds something else.
    """
    try:
        refuse_overlap(path, inputs)
        if path.is_file() and os.access(path.absolute().parent, os.W_OK):
            with path.open(encoding="utf-8", errors="replace") as file:
                if MARK_START in file.read(2000):
                    return
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError):
        there = False  # a name that no file can have, which check_output refuses
    if there:
        raise OutputError(
            f"{path} exists and is no report of eigenslice",
            allowed="a free name in an existing folder, or an older report",
            next_step="choose another --output",
        )
    check_output(path, inputs=inputs)
