"""`eigenslice eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Device, Quiet, RunDtype, TrustCheckpoint


def eval_(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or .gguf files, dense or sliced.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to predict: builtin, wikitext2, c4, alpaca, ptb, fineweb-edu, tinystories, code (their held-out "
            "parts), mixed (one after another), a file (as slice's --calibration), or a hub data set "
            "NAME[:CONFIG[:SPLIT]] [wikitext2]. Several: a perplexity for each."
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="Text field of records or tensor of a file, as slice's --field; once, or once for each text."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of perplexity: tasks of lm-eval, joined by commas, such as piqa,arc_easy."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files (YAML) of your own, for --tasks.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question [the task's own number].")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, from its start [all].")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once, for --tasks.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Ask tasks in the models' chat templates.")] = False,
    samples: Annotated[int, typer.Option(help="Windows of each text, from its start.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    device: Device = None,
    dtype: RunDtype = None,
    trust_remote_code: TrustCheckpoint = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity over all predicted tokens of a text, or scores of tasks; models are compared with the first."""
    if tasks is not None:
        _tasks(
            models,
            tasks,
            data,
            as_json,
            quiet,
            include_path=include_path,
            fewshot=fewshot,
            limit=limit,
            batch=batch,
            chat=chat,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        return
    from eigenslice.data.sources import one_by_one
    from eigenslice.evaluation.perplexity import evaluate_each
    from eigenslice.options.calibration import CalibrationOptions

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


def _tasks(models: list[str], tasks: str, data: list[str] | None, as_json: bool, quiet: bool, **options: Any) -> None:
    from eigenslice.errors import OptionsError
    from eigenslice.evaluation.tasks import evaluate_tasks
    from eigenslice.options.tasks import TaskOptions
    from eigenslice.report.measured import short_names

    if data:
        raise OptionsError("--tasks with --data", allowed="one of them", next_step="run eigenslice eval twice")
    names = tuple(dict.fromkeys(task.strip() for task in tasks.split(",") if task.strip()))
    with progress_bar(quiet) as progress:
        result = evaluate_tasks(models, TaskOptions(tasks=names, **options), progress)
    if as_json:
        output.print_json(json.dumps(result))
        return
    short = short_names(models)
    table = Table("task", "metric", *(short[model] for model in models))
    scores = [{(score["task"], score["metric"]): score for score in row["scores"]} for row in result["models"]]
    for key, score in scores[0].items():
        cells = []
        for row in scores:
            found = row.get(key)
            if found is None:  # it was NaN
                cells.append("")
                continue
            error = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
            change = "" if row is scores[0] else f" ({found['value'] - score['value']:+.4f})"
            cells.append(f"{found['value']:.4f}{error}{change}")
        table.add_row(score["task"], score["metric"], *cells)
    output.print(table)
