"""What all verbs print with: results to standard output, progress, warnings and errors to standard error."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from eigenslice.errors import EigensliceWarning, OptionsError

output = Console()
errors = Console(stderr=True)
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended
SECONDS = 5.0  # between two lines of progress where there is no terminal


@contextmanager
def progress_bar(
    quiet: bool,
    as_json: bool = False,
    log: Path | None = None,
    interrupted: Callable[[], str] = lambda: "nothing was written",
) -> Iterator[Callable[..., None]]:
    """Give a function that shows how far a stage is; warnings are printed above the bar.

    A terminal gets a bar for each stage, anything else a line now and then, with `as_json` one that is JSON.

    Args:
        quiet: Show nothing.
        as_json: Each line is a JSON object.
        log: Folder for TensorBoard's events, too.
        interrupted: Says what Ctrl-C left.
    """
    from eigenslice.progress import Pacer

    pacer = Pacer()
    bars = errors.is_terminal and not quiet and not as_json
    columns = (
        TextColumn("{task.fields[stage]:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    bar = Bars(*columns, console=errors, disable=not bars)
    tasks: dict[str, Any] = {}
    printed: dict[str, float] = {}
    events = _events(log)

    def report(stage: str, done: int, total: int, tokens: int = 0) -> None:
        pace = pacer(stage, done, total, tokens)
        if events:
            for name in ("tokens_per_second", "memory", "device_memory", "done"):
                value = getattr(pace, name)
                if value is not None:
                    events.add_scalar(f"{stage}/{name}", value, done)
        if bars:
            if stage not in tasks:
                tasks[stage] = bar.add_task("", total=total, stage=stage)
            bar.update(tasks[stage], completed=done, description=str(pace).partition(", ")[2])
        elif not quiet and (done == total or time.monotonic() - printed.get(stage, 0.0) > SECONDS):
            printed[stage] = time.monotonic()
            line = json.dumps(asdict(pace)) if as_json else str(pace)
            errors.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        errors.print("warning:", style="yellow", end=" ")
        errors.print(str(message), markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", EigensliceWarning)
        warnings.showwarning = show
        try:
            yield report
        except KeyboardInterrupt:
            bar.stop()
            errors.print(f"interrupted; {interrupted()}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            if events:
                events.close()


def _events(folder: Path | None) -> Any:
    """TensorBoard's writer, None if no folder was named."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptionsError(
            "--log-dir, and tensorboard isn't installed",
            allowed="--log-dir where tensorboard is installed",
            next_step="pip install tensorboard, or leave the option out",
        ) from error
    return SummaryWriter(str(folder))
