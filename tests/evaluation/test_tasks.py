"""Tasks through lm-eval, offline: a PIQA-like one from a local file."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from eigenslice.errors import CalibrationError, EigensliceWarning, OptionsError
from eigenslice.evaluation.tasks import evaluate_tasks, scores
from eigenslice.options.evaluation import TaskOptions
from eigenslice.report.measured import tasks as plot
from tests import tiny, words
from tests.checkpoint.files import copy_of
from tests.cli.conftest import Command, command  # noqa: F401
from tests.conftest import Folders, Slicer
from tests.messages import check_message

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its packages' own


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with the task pairs: which of two continuations is it?"""
    ids = tiny.random_ids(12, 12).tolist()
    records = [
        {"goal": words.text(row[:4]), "sol1": words.text(row[4:8]), "sol2": words.text(row[8:]), "label": row[0] % 2}
        for row in ids
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content: dict[str, Any] = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "pairs.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{goal}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    (folder / "pairs.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def models(dense_folder: Folders, run_slice: Slicer, tmp_path: Path) -> list[str]:
    """A dense OPT and a sliced one (the custom class)."""
    dense = copy_of(dense_folder("opt"), tmp_path / "dense")
    words.tokenizer().save_pretrained(dense)
    return [str(dense), str(run_slice("opt", model=str(dense), width=16).output)]


def test_scores_are_lm_evals_own(task: Path, models: list[str], tmp_path: Path) -> None:
    import lm_eval

    ask: Any = lm_eval.simple_evaluate
    result = evaluate_tasks(models, TaskOptions(tasks=("pairs",), include_path=task, batch=4, device="cpu"))
    manager = lm_eval.tasks.TaskManager(include_path=str(task), include_defaults=False)
    for row, name in zip(result["models"], models, strict=True):
        direct = ask(
            model="hf",
            model_args={"pretrained": name, "dtype": "float32"},
            tasks=["pairs"],
            task_manager=manager,
            device="cpu",
            batch_size=4,
        )
        expected = direct["results"]["pairs"]
        assert row["model"] == name
        assert [(score["metric"], score["value"], score["stderr"]) for score in row["scores"]] == [
            (metric, expected[f"{metric},none"], expected[f"{metric}_stderr,none"]) for metric in ("acc", "acc_norm")
        ]
        assert row["lm_eval"]["n-samples"]["pairs"]["effective"] == 12
    assert json.loads(json.dumps(result)) == result
    assert [bars["y"] for bars in plot(result)["data"]] == [
        [score["value"] for score in row["scores"]] for row in result["models"]
    ]


def test_the_table(task: Path, models: list[str], command: Command) -> None:  # noqa: F811
    arguments = ["--tasks", "pairs", "--include-path", task, "--device", "cpu"]
    outcome = command("eval", *models, *arguments, "--limit", 6, "--json", "-q")
    assert outcome.code == 0, outcome
    rows = outcome.json["models"]
    table = command("eval", *models, *arguments, "--limit", 6, "-q").out
    for row in rows:
        for score in row["scores"]:
            assert f"{score['value']:.4f} ± {score['stderr']:.4f}" in table
    assert rows[0]["lm_eval"]["n-samples"]["pairs"]["effective"] == 6


def test_what_can_not_be_asked(task: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # thousands of files take ten seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    with pytest.raises(OptionsError, match="lm-eval has no task pears"):
        evaluate_tasks(models, TaskOptions(tasks=("pears",), include_path=task))
    with pytest.raises(OptionsError, match="is no folder"):
        TaskOptions(tasks=("pairs",), include_path=task / "nothing")
    (task / "pairs.jsonl").unlink()
    with pytest.raises(CalibrationError, match="can't be loaded"):
        evaluate_tasks(models, TaskOptions(tasks=("pairs",), include_path=task))


WRONG: list[dict[str, Any]] = [
    {"metric_list": [{"metric": "acc", "aggregation": "nothing", "higher_is_better": True}]},
    {"metric_list": [{"metric": "nothing"}]},
    {"doc_to_text": "{{goal"},
    {"doc_to_text": "{{1 / 0}}"},
    {"doc_to_choice": "{{[]}}"},
    {"validation_split": "nothing"},
    {"output_type": "nothing"},
    {"output_type": "generate_until", "generation_kwargs": {"until": 3}},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_tasks_that_lm_eval_can_not_run(
    change: dict[str, Any], task: Path, models: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = task / "pairs.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(CalibrationError) as caught:
        evaluate_tasks(models[:1], TaskOptions(tasks=("pairs",), include_path=task, device="cpu"))
    check_message(caught.value, "the tasks pairs")
    assert "Traceback" not in capfd.readouterr().err


def test_a_task_without_questions(task: Path, models: list[str]) -> None:
    (task / "pairs.jsonl").write_text("")
    with pytest.raises(CalibrationError, match="pairs can't be loaded"):
        evaluate_tasks(models[:1], TaskOptions(tasks=("pairs",), include_path=task, device="cpu"))


def test_scores_that_are_no_numbers_are_left_out() -> None:
    metrics = {"acc,none": float("nan"), "f1,none": 0.5, "f1_stderr,none": float("nan")}
    with pytest.warns(EigensliceWarning, match="x: acc is nan"):
        found = scores({"results": {"x": metrics}})
    assert found == [{"task": "x", "metric": "f1", "value": 0.5, "stderr": None}]


def test_scores_with_filters_and_without_errors() -> None:
    metrics = {"alias": "x", "em,strict": 0.5, "em_stderr,strict": 0.25, "word_perplexity,none": 9.0}
    metrics["word_perplexity_stderr,none"] = "N/A"
    assert scores({"results": {"x": metrics}}) == [
        {"task": "x", "metric": "em, strict", "value": 0.5, "stderr": 0.25},
        {"task": "x", "metric": "word_perplexity", "value": 9.0, "stderr": None},
    ]
