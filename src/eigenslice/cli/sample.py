"""`eigenslice sample`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Device, Quiet, Revision, RunDtype, TrustCheckpoint


def sample(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Option("--output", "-o", help=".json file to write; must not exist.")],
    revision: Revision = None,
    samples: Annotated[int, typer.Option(help="Texts to write.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 32,
    temperature: Annotated[float, typer.Option(help="1 draws tokens as the model predicts them.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of beginnings and drawing.")] = 0,
    device: Device = None,
    dtype: RunDtype = None,
    trust_remote_code: TrustCheckpoint = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let a model write text by itself, to calibrate with: of all the kinds that it was trained on."""
    from eigenslice.checkpoint.hub import with_revision
    from eigenslice.data.own_text import sample_text
    from eigenslice.options.sampling import SampleOptions

    options = SampleOptions(
        model=with_revision(model, revision),
        output=out,
        samples=samples,
        seqlen=seqlen,
        batch=batch,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar(quiet) as progress:
        texts = sample_text(options, progress)
    if as_json:
        written = {"output": str(options.output), "texts": len(texts), "characters": sum(map(len, texts))}
        output.print_json(json.dumps(written))
        return
    line = f"{options.output}: {len(texts)} texts of {seqlen} tokens; mix it in with --calibration {options.output}"
    output.print(line, highlight=False, markup=False, soft_wrap=True)
