"""Benchmarks' tasks (multiple choice, questions, ...) through EleutherAI's lm-eval."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eigenslice.checkpoint.loading import load_model
from eigenslice.errors import CalibrationError, EigensliceError, EigensliceWarning, OptionsError, first_line
from eigenslice.options.evaluation import TaskOptions

Progress = Callable[[str, int, int], None]


def evaluate_tasks(
    models: list[str], options: TaskOptions, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """Evaluate models on tasks; every value is JSON.

    Args:
        models: Folders, hub ids or .gguf files, dense or sliced.
        options: The options of the command.
        progress: Called as the work goes on.

    Returns:
        `settings` and `models`. Each model has `model`, `scores` and `lm_eval`. `scores` is a list of `task`, `metric`,
        `value` and `stderr` (None for metrics without a standard error). `lm_eval` is lm-eval's answer without the
        single questions.

    Raises:
        OptionsError: a task that lm-eval doesn't know.
        CalibrationError: a task's data can't be loaded.
        CheckpointError: a model can't be loaded.
    """
    manager = _manager(options)
    rows = []
    for number, name in enumerate(models):
        progress("asking", number, len(models))
        rows.append({"model": name} | _evaluate(name, options, manager))
    progress("asking", len(models), len(models))
    return {"settings": options.model_dump(mode="json"), "models": rows}


def _manager(options: TaskOptions) -> Any:
    """lm-eval's task manager, after all tasks were loaded once.

    It reads the thousands of files of lm-eval's own tasks, which takes ten seconds, only where they are needed.
    """
    from lm_eval.tasks import TaskManager

    include = str(options.include_path) if options.include_path else None
    with _translated(f"the task files of lm-eval and {include} can't be read"):
        manager = TaskManager(include_path=include, include_defaults=False) if include else None
        if manager is None or not set(options.tasks) <= set(manager.all_subtasks):  # groups may name lm-eval's own
            manager = TaskManager(include_path=include)
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        raise OptionsError(
            f"lm-eval has no task {', '.join(unknown)}",
            allowed="its tasks and groups (`lm-eval ls tasks`), and those in --include-path",
            next_step="check the spelling and the task's file (YAML), or add --include-path",
        )
    with _translated(f"the tasks {', '.join(options.tasks)} can't be loaded"):
        manager.load(list(options.tasks))
    return manager


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Errors of lm-eval, its data sets, templates, metrics and task files, each of which fails in its own way."""
    try:
        with _quiet():
            yield
    except (EigensliceError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise CalibrationError(
            f"{what} ({first_line(error)})",
            allowed="tasks that lm-eval can run, and whose data can be read: local files, the cache or the network",
            next_step="check the task's file, its data and metrics, and the network",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs its errors with tracebacks before it raises them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _evaluate(name: str, options: TaskOptions, manager: Any) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.models import huggingface
    from lm_eval.utils import handle_non_serializable

    wrap: Any = huggingface.HFLM  # decorators hide both signatures
    ask: Any = evaluator.simple_evaluate
    loaded = load_model(name, options.device, options.dtype, options.trust_remote_code)
    with _translated(f"lm-eval can't run {name}"):
        model = wrap(pretrained=loaded.model, tokenizer=loaded.tokenizer(), batch_size=options.batch)
    with _translated(f"lm-eval can't ask {name} the tasks {', '.join(options.tasks)}"):
        results = ask(
            model=model,
            tasks=list(options.tasks),
            task_manager=manager,
            num_fewshot=options.fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            log_samples=False,
        )
        plain = json.loads(json.dumps(results, default=handle_non_serializable))
    all_scores = scores(plain)
    if not all_scores:
        raise CalibrationError(
            f"the tasks {', '.join(options.tasks)} give {name} no score",
            allowed="tasks with questions and metrics that are numbers",
            next_step="check the task's data, its metric_list and --limit",
        )
    return {"scores": all_scores, "lm_eval": plain}


def scores(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All metrics in lm-eval's results, "metric,filter": value beside "metric_stderr,filter": standard error.

    NaN and infinite metrics, such as means over no question, are left out with a warning.
    """
    all_scores = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else f"{metric}, {chosen}"
            if not math.isfinite(value):
                warnings.warn(f"{task}: {name} is {value}, and left out", EigensliceWarning, stacklevel=2)
                continue
            stderr = error if isinstance(error, int | float) and math.isfinite(error) else None
            all_scores.append({"task": task, "metric": name, "value": value, "stderr": stderr})
    return all_scores
