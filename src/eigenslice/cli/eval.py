"""`eigenslice eval`."""

import json
from typing import Annotated, Literal

import typer

from eigenslice.cli.console import output, progress_bar


def eval_(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or .gguf files, dense or sliced.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text to predict: builtin, wikitext2, c4, alpaca, ptb (their test split), a file, or a hub "
            "data set NAME[:CONFIG[:SPLIT]]."
        ),
    ] = "wikitext2",
    field: Annotated[str | None, typer.Option(help="Text field of records, or tensor of a file.")] = None,
    samples: Annotated[int, typer.Option(help="Windows, from the start of the text.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    device: Annotated[str | None, typer.Option(help="torch device [a GPU if there is one].")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Dtype to run in [float32 on CPU, the stored one on a GPU]."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run its own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Perplexity, token-weighted over all predicted tokens; several models are compared with the first."""
    from eigenslice.evaluate import evaluate
    from eigenslice.options import CalibrationOptions

    options = CalibrationOptions(data=data, field=field, samples=samples, seqlen=seqlen)
    results = []
    for model in models:
        with progress_bar(quiet) as progress:
            results.append(evaluate(model, options, device, dtype, trust_remote_code, progress))
    if as_json:
        rows = [{"model": m} | r.as_dict() for m, r in zip(models, results, strict=True)]
        output.print_json(json.dumps(rows))
        return
    for model, result in zip(models, results, strict=True):
        ratio = f"  x{result.perplexity / results[0].perplexity:.3f}" if len(models) > 1 else ""
        output.print(
            f"perplexity {result.perplexity:.4f}{ratio}  over {result.tokens} tokens of {result.data['data']}  {model}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
