"""The command line: one file a verb, each calls one function of the library."""

import sys
from typing import Annotated

import typer

from eigenslice._version import __version__
from eigenslice.cli import bench as bench_verb
from eigenslice.cli import eval as eval_verb
from eigenslice.cli import export as export_verb
from eigenslice.cli import finetune as finetune_verb
from eigenslice.cli import inspect as inspect_verb
from eigenslice.cli import report as report_verb
from eigenslice.cli import sample as sample_verb
from eigenslice.cli import slice as slice_verb
from eigenslice.cli.boundary import run
from eigenslice.cli.commands import command
from eigenslice.cli.console import output

app = typer.Typer(
    name="eigenslice",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make transformer language models smaller and faster: rotate, slice, no retraining."""


VERBS = {
    "slice": slice_verb.slice_,
    "inspect": inspect_verb.inspect,
    "sample": sample_verb.sample,
    "eval": eval_verb.eval_,
    "bench": bench_verb.bench,
    "finetune": finetune_verb.finetune,
    "report": report_verb.report,
    "export": export_verb.export,
}
for _name, _verb in VERBS.items():
    app.command(_name)(command(_verb))


def main() -> None:
    """Run the command line; every error ends in one message and exit code 2, Ctrl-C in 130."""
    sys.exit(run(app))
