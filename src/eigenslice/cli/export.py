"""`eigenslice export`."""

import json

from eigenslice.cli.commands import Given
from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Quiet, Revision
from eigenslice.options.exporting import ExportOptions


def export(
    given: Given[ExportOptions], revision: Revision = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Write a model for another runtime, and check there that it computes the same as transformers."""
    from eigenslice.export import export_model

    options = given.options(revision)
    with progress_bar(quiet) as progress:
        result = export_model(options, progress)
    if as_json:
        output.print_json(json.dumps(result.as_dict()))
        return
    formats = ", ".join(f"{number} {name}" for name, number in result.formats.items())
    lines = [f"{options.output}: {result.bytes / 1e6:.1f} MB, matrices: {formats}"]
    if result.agreement is not None:
        lines.append(
            f"{options.to} against transformers: {result.agreement.describe()} (allowed: mean {result.tolerance})"
        )
    if result.unrounded is not None:
        lines.append(f"against the weights before rounding: {result.unrounded.describe()}")
    for line in lines:
        output.print(line, highlight=False, markup=False, soft_wrap=True)
