"""What all verbs print with: results to standard output, progress, warnings and errors to standard error."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

output = Console()
errors = Console(stderr=True)
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that draws how far a stage is; warnings are printed above the bar.

    A terminal gets a bar for each stage, anything else one line a stage.
    """
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=errors, disable=quiet or not errors.is_terminal)
    tasks = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
            if not quiet and not errors.is_terminal:
                errors.print(f"{stage} ({total})", highlight=False)
        bar.update(tasks[stage], completed=done)

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        errors.print("warning:", style="yellow", end=" ")
        errors.print(str(message), markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings(), bar:
        from eigenslice.data.tokens import EigensliceWarning

        warnings.simplefilter("ignore")
        warnings.simplefilter("always", EigensliceWarning)
        warnings.showwarning = show
        try:
            yield report
        except KeyboardInterrupt:
            errors.print("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None
