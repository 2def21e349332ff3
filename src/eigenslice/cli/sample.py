"""`eigenslice sample`."""

import json

from eigenslice.cli.commands import Given
from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Quiet, Revision
from eigenslice.options.sampling import SampleOptions


def sample(
    given: Given[SampleOptions], revision: Revision = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Let a model write text by itself, to calibrate with: of all the kinds that it was trained on."""
    from eigenslice.data.own_text import sample_text

    options = given.options(revision)
    with progress_bar(quiet) as progress:
        texts = sample_text(options, progress)
    if as_json:
        written = {"output": str(options.output), "texts": len(texts), "characters": sum(map(len, texts))}
        output.print_json(json.dumps(written))
        return
    out = options.output
    line = f"{out}: {len(texts)} texts of {options.seqlen} tokens; mix it in with --calibration {out}"
    output.print(line, highlight=False, markup=False, soft_wrap=True)
