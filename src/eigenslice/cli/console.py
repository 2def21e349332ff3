"""Printing for all verbs: results to standard output; progress, warnings and errors to standard error."""

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
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from eigenslice._interrupt import INTERRUPTED
from eigenslice.errors import EigensliceWarning, OptionsError, first_line, printable


class Printer(Console):
    """A printer of texts as they are: names may look like rich's markup or emoji codes, or hold control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **settings)

    def print_json(self, json: str, **settings: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """JSON in ASCII, which every terminal and pipe takes as it is."""
        super().print_json(json, ensure_ascii=True, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **settings)


output = Printer()
errors = Printer(stderr=True)
SECONDS = 5.0  # between two lines of progress where there is no terminal


@contextmanager
def progress_bar(
    quiet: bool,
    as_json: bool = False,
    log: Path | None = None,
    interrupted: Callable[[], str] = lambda: "nothing was written",
) -> Iterator[Callable[..., None]]:
    """Give a function that shows the progress of a stage; warnings are printed above the bar.

    A terminal gets a bar for each stage. Other outputs get a line now and then, with `as_json` in JSON.

    Args:
        quiet: Show nothing.
        as_json: Each line is a JSON object.
        log: Folder for TensorBoard's events.
        interrupted: Function that gives the message after Ctrl-C.
    """
    from eigenslice.runtime.progress import Pacer

    pacer = Pacer()
    bars = errors.is_terminal and not quiet and not as_json
    bar = Bars(*_columns(), console=errors, disable=not bars)
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
            errors.print(line, soft_wrap=True)

    with warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", EigensliceWarning)
        warnings.showwarning = show_warning
        try:
            yield report
        except KeyboardInterrupt:
            bar.stop()
            errors.print(f"interrupted; {interrupted()}", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            if events:
                events.close()


def _columns() -> list[ProgressColumn]:
    """Make the columns of a progress bar."""
    stage, rest = TextColumn("{task.fields[stage]:>10}"), TextColumn("{task.description}")
    return [stage, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), rest]


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print a warning of eigenslice's on one line; in the place of `warnings.showwarning`."""
    errors.print("warning:", style="yellow", end=" ")
    errors.print(printable(str(message)), soft_wrap=True)


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
    try:
        return SummaryWriter(str(folder))
    except (OSError, ValueError) as error:
        raise OptionsError(
            f"--log-dir {folder} can't be written ({first_line(error)})",
            allowed="a folder to write to, or a name for one",
            next_step="choose another --log-dir, or leave the option out",
        ) from error
