"""`eigenslice eval`."""

import json
from typing import Annotated, Literal

import typer

from eigenslice.cli.console import output, progress_bar


def eval_(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or .gguf files, dense or sliced.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to predict: builtin, wikitext2, c4, alpaca, ptb, fineweb-edu, tinystories, code (their held-out "
            "parts), mixed (one after another), a file, or a hub data set NAME[:CONFIG[:SPLIT]] [wikitext2]. Several: "
            "a perplexity for each."
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Text field of records, or tensor of a file; once, or once for each text."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of each text, from its start.")] = 128,
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
    """Perplexity, token-weighted over all predicted tokens of a text; several models are compared with the first."""
    from eigenslice.data.sources import one_by_one
    from eigenslice.evaluate import evaluate_each
    from eigenslice.options import CalibrationOptions

    names = tuple(data or ["wikitext2"])
    texts = one_by_one(CalibrationOptions(data=names, field=tuple(field or ()), samples=samples, seqlen=seqlen))
    results = []
    for model in models:
        with progress_bar(quiet) as progress:
            results.append(evaluate_each(model, texts, device, dtype, trust_remote_code, progress))
    rows = [(model, i, result) for model, each in zip(models, results, strict=True) for i, result in enumerate(each)]
    if as_json:
        output.print_json(json.dumps([{"model": model} | result.as_dict() for model, _, result in rows]))
        return
    for model, i, result in rows:
        ratio = f"  x{result.perplexity / results[0][i].perplexity:.3f}" if len(models) > 1 else ""
        output.print(
            f"perplexity {result.perplexity:.4f}{ratio}  over {result.tokens} tokens of {result.data['data']}  {model}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
