"""`eigenslice report`."""

from pathlib import Path
from typing import Annotated

import typer

from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import Quiet, TrustCheckpoints


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that eigenslice wrote.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write [FOLDER-report.html beside the folder].")
    ] = None,
    perplexity: Annotated[
        Path | None, typer.Option(help="JSON of eigenslice eval --json, or of benchmarks/quality.py.")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="JSON of eigenslice eval --tasks ... --json.")] = None,
    bench: Annotated[Path | None, typer.Option(help="JSON of eigenslice bench --json.")] = None,
    generate: Annotated[str | None, typer.Option(help="The dense model: show what both write.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt for --generate; may be repeated.")] = None,
    new: Annotated[int, typer.Option(help="Tokens to write after each.")] = 60,
    device: Annotated[str | None, typer.Option(help="torch device for --generate [a GPU if there is one].")] = None,
    trust_remote_code: TrustCheckpoints = False,
    quiet: Quiet = False,
) -> None:
    """One HTML page about a result, which needs no network: sizes, spectra, quality, speed, samples."""
    from eigenslice.report import ReportOptions
    from eigenslice.report import report as run

    values = {"prompts": tuple(prompt)} if prompt else {}
    options = ReportOptions(
        folder=folder,
        output=out,
        perplexity=perplexity,
        tasks=tasks,
        bench=bench,
        generate=generate,
        new=new,
        device=device,
        trust_remote_code=trust_remote_code,
        **values,
    )
    with progress_bar(quiet) as progress:
        path = run(options, progress)
    if not quiet:
        output.print(str(path), highlight=False, markup=False, soft_wrap=True)
