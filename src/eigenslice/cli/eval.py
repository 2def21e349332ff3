"""`eigenslice eval`."""

import json

from rich.table import Table

from eigenslice.cli.commands import Given
from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Compared, Quiet
from eigenslice.errors import OptionsError
from eigenslice.options.evaluation import PerplexityOptions, TaskOptions
from eigenslice.options.generating import GenerationOptions


def eval_(
    models: Compared,
    given: Given[PerplexityOptions],
    tasks: Given[TaskOptions],
    generation: Given[GenerationOptions],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity over all predicted tokens of a text, scores of tasks, or figures of written text.

    Models are compared with the first.
    """
    asked = {
        "--tasks": "tasks" in tasks.values,
        "--generate": "data" in generation.values.get("text", {}),
        "--data": "data" in given.values.get("text", {}),
    }
    if sum(asked.values()) > 1:
        named = " with ".join(flag for flag, wanted in asked.items() if wanted)
        raise OptionsError(named, allowed="one of them", next_step="run eigenslice eval for each of them")
    if asked["--tasks"]:
        _tasks(models, tasks, as_json, quiet)
    elif asked["--generate"]:
        _generation(models, generation, as_json, quiet)
    else:
        _perplexities(models, given, as_json, quiet)


def _perplexities(models: list[str], given: Given[PerplexityOptions], as_json: bool, quiet: bool) -> None:
    from eigenslice.data.sources import one_by_one
    from eigenslice.evaluation.perplexity import evaluate_each

    options = given.options()
    texts = one_by_one(options.text)
    run = options.device, options.dtype, options.trust_remote_code
    results = []
    for model in models:
        with progress_bar(quiet) as progress:
            results.append(evaluate_each(model, texts, *run, progress))
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


def _tasks(models: list[str], given: Given[TaskOptions], as_json: bool, quiet: bool) -> None:
    from eigenslice.evaluation.tasks import evaluate_tasks
    from eigenslice.report.measured import short_names

    options = given.options()
    with progress_bar(quiet) as progress:
        result = evaluate_tasks(models, options, progress)
    if as_json:
        output.print_json(json.dumps(result))
        return
    short = short_names(models)
    table = Table("task", "metric", *(short[model] for model in models))
    scores = [{(score["task"], score["metric"]): score for score in row["scores"]} for row in result["models"]]
    for key, score in scores[0].items():
        cells = []
        for row in scores:
            score_of_row = row.get(key)
            if score_of_row is None:  # it was NaN
                cells.append("")
                continue
            error = "" if score_of_row["stderr"] is None else f" ± {score_of_row['stderr']:.4f}"
            change = "" if row is scores[0] else f" ({score_of_row['value'] - score['value']:+.4f})"
            cells.append(f"{score_of_row['value']:.4f}{error}{change}")
        table.add_row(score["task"], score["metric"], *cells)
    output.print(table)


def _generation(models: list[str], given: Given[GenerationOptions], as_json: bool, quiet: bool) -> None:
    from eigenslice.evaluation.generation import evaluate_generation
    from eigenslice.report.measured import short_names
    from eigenslice.report.written import NOTE, written_rows

    options = given.options()
    with progress_bar(quiet) as progress:
        result = evaluate_generation(models, options, progress)
    if as_json:
        output.print_json(json.dumps(result))
        return
    short = short_names(models)
    table = Table("", *(short[model] for model in models))
    for label, cells in written_rows(result):
        table.add_row(label, *cells)
    output.print(table)
    output.print(f"{result['prompts']} prompts, up to {options.new} tokens after each. {NOTE}", soft_wrap=True)
