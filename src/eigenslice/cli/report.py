"""`eigenslice report`."""

from eigenslice.cli.commands import Given
from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import Quiet
from eigenslice.options.reporting import ReportOptions


def report(given: Given[ReportOptions], quiet: Quiet = False) -> None:
    """One HTML page about a result, which needs no network: sizes, spectra, quality, speed, samples."""
    from eigenslice.report import report as run

    options = given.options()
    with progress_bar(quiet) as progress:
        path = run(options, progress)
    if not quiet:
        output.print(str(path), highlight=False, markup=False, soft_wrap=True)
