"""Flags, their defaults and ranges, --help and docs/options.md, which all come from the models in `options/`."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from eigenslice.cli import VERBS, app
from eigenslice.cli.commands import Flag, flags_of
from eigenslice.cli.reference import reference
from eigenslice.options.benchmark import BenchOptions
from eigenslice.options.flags import PANELS, Nested, Option, Options, Range, described
from eigenslice.options.slicing import SliceOptions
from tests.cli.conftest import Command

RECORD = json.loads(Path(__file__).with_name("flags.json").read_text())
"""Flags with the values that --help shows, options without any flag, and ranges, as they were written by hand."""
FLAGS = [(verb, flag) for verb, function in VERBS.items() for flag in flags_of(function)]
MODELS = {kind.__name__: kind for kind in Options.__subclasses__()}
PAGE = Path(__file__).parents[2] / "docs" / "options.md"
LIBRARY = {
    "slice": ("eigenslice.healing.slice_model", 0, ["M", "-o", "O", "--keep", "0.5"]),
    "finetune": ("eigenslice.finetune.finetune", 0, ["M", "-o", "O"]),
    "finetune --recipe": (
        "eigenslice.finetune.finetune",
        0,
        ["M", "-o", "O", "--recipe", "paper", "--rank", "5", "--seqlen", "9"],
    ),
    "sample": ("eigenslice.data.own_text.sample_text", 0, ["M", "-o", "O.json"]),
    "export": ("eigenslice.export.export_model", 0, ["M", "-o", "O", "--to", "gguf"]),
    "report": ("eigenslice.report.report", 0, ["M"]),
    "bench": ("eigenslice.evaluation.speed.bench", 1, ["M"]),
    "eval --tasks": ("eigenslice.evaluation.tasks.evaluate_tasks", 1, ["M", "--tasks", "a, b,a"]),
    "eval --generate": (
        "eigenslice.evaluation.generation.evaluate_generation",
        1,
        ["M", "--generate", "builtin"],
    ),
}
"""The function that each verb calls, the position of its options, and a command line."""


@pytest.fixture
def shown(command: Command, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What --help of every verb prints, on lines of 200 characters."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return {verb: command(verb, "--help").out for verb in VERBS}


def words(text: str) -> str:
    """A text without borders and line breaks."""
    return " ".join(re.sub(r"[│|]", " ", text).split())


def is_named(flag: Flag, *of: str) -> bool:
    return {*flag.names, *filter(None, [flag.negative])} == set(of)


def test_no_flag_has_changed(shown: dict[str, str]) -> None:
    for verb, recorded in RECORD["flags"].items():
        for names, values in recorded.items():
            flag = next(flag for flag in flags_of(VERBS[verb]) if is_named(flag, *names.split()))
            assert (flag.default is ...) == values.endswith(" required")
            name = flag.names[0].lstrip("-")
            line = next(row for row in shown[verb].splitlines() if re.match(rf"\W+{name}[\s,.].*<", row))
            assert f"<{values.removesuffix(' required')}>" in line


@pytest.mark.parametrize("case", LIBRARY)
def test_no_default_has_changed(case: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    path, position, arguments = LIBRARY[case]
    module, _, name = path.rpartition(".")
    calls: list[Any] = []

    def called(*given: Any) -> None:
        calls.append(given[position])
        raise SystemExit(7)

    monkeypatch.setattr(importlib.import_module(module), name, called)
    assert command(case.split()[0], *arguments).code == 7
    assert calls[0].model_dump(mode="json") == RECORD["defaults"][case]


def test_an_effort_sets_what_is_left_out(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[SliceOptions] = []

    def called(options: SliceOptions, progress: Any) -> None:
        calls.append(options)
        raise SystemExit(7)

    monkeypatch.setattr("eigenslice.healing.slice_model", called)
    arguments = ["slice", "m", "-o", "o", "--keep", "0.8", "--effort", "fast", "--samples", "128", "--trials"]
    assert command(*arguments).code == 7
    assert (calls[0].calibration.samples, calls[0].calibration.seqlen) == (128, 512)
    assert (calls[0].trials, calls[0].own_text) == (True, 0.0)


def test_no_default_of_a_perplexity_has_changed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def called(model: str, texts: list[Any], device: Any, dtype: Any, trust_remote_code: bool, progress: Any) -> None:
        (text,) = texts
        calls.append([text.model_dump(mode="json"), device, dtype, trust_remote_code])
        raise SystemExit(7)

    monkeypatch.setattr("eigenslice.evaluation.perplexity.evaluate_each", called)
    assert command("eval", "M").code == 7
    assert calls == [list(RECORD["defaults"]["eval"].values())]
    assert command("eval", "M", "--data", "ptb", "--seqlen", 5, "--dtype", "float16").code == 7
    assert calls[1] == [calls[0][0] | {"data": ["ptb"], "seqlen": 5}, None, "float16", False]


def test_no_default_of_an_inspection_has_changed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def called(*given: Any) -> None:
        calls.append(given)
        raise SystemExit(7)

    monkeypatch.setattr("eigenslice.inspection.inspect.inspect_model", called)
    assert command("inspect", "M").code == 7
    assert command("inspect", "M", "--seqlen", 9, "--device", "cpu").code == 7
    assert calls == [("M", False, 128, 2048, None), ("M", False, 128, 9, "cpu")]


def test_no_range_has_changed() -> None:
    for kind, limits in RECORD["ranges"].items():
        found = {name: described(MODELS[kind], name, Range) for name in MODELS[kind].model_fields}
        assert {name: [limit.low, limit.high] for name, limit in found.items() if limit} == limits


@pytest.mark.parametrize(("verb", "flag"), FLAGS, ids=lambda value: value if isinstance(value, str) else value.key)
def test_defaults_of_the_command_line_are_the_models(verb: str, flag: Flag) -> None:
    group: Any = typer.main.get_command(app)
    parameter = next(parameter for parameter in group.commands[verb].params if parameter.name == flag.key)
    assert parameter.required == (flag.default is ...)
    if not parameter.required:
        assert parameter.default == (list(flag.default) or None if isinstance(flag.default, tuple) else flag.default)


def test_help_shows_every_option_and_every_hint(shown: dict[str, str]) -> None:
    for verb, flag in FLAGS:
        text = words(shown[verb])
        hint = f" [{flag.option.hint}]" if flag.option.hint else ""
        assert words(flag.option.help) + hint in text, (verb, flag)
        assert all(name in text for name in flag.names)
        if not hint and flag.default not in (..., None, ()) and not flag.is_switch:
            value = ", ".join(flag.default) if isinstance(flag.default, tuple) else flag.default
            assert f"{words(flag.option.help)} [default: {value}]" in text


def test_help_shows_panels_in_their_order(shown: dict[str, str]) -> None:
    for verb, function in VERBS.items():
        titles = re.findall(r"^\W+ (\w+) \W+$", shown[verb], re.MULTILINE)
        expected = [panel for panel in PANELS if panel in {flag.option.panel for flag in flags_of(function)}]
        assert titles == ["Arguments", "Options", *filter(None, expected)]


def test_hints_are_no_markup(shown: dict[str, str]) -> None:
    assert "Stored dtype. [as the source]" in words(shown["slice"])
    assert "torch device. [a GPU if there is one]" in words(shown["bench"])
    assert "NAME[:CONFIG[:SPLIT]]" in words(shown["eval"])


def test_every_field_is_an_option() -> None:
    assert len(MODELS) == 11
    missing = [
        (kind, name)
        for kind in MODELS.values()
        for name in kind.model_fields
        if not described(kind, name, Option) and not described(kind, name, Nested)
    ]
    assert missing == [(BenchOptions, "seed")]


def test_flags_are_unique() -> None:
    for verb in VERBS:
        names = [name for each, flag in FLAGS if each == verb for name in (*flag.names, flag.negative) if name]
        assert len(names) == len(set(names))


def test_the_page_is_the_one_that_the_code_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run make docs"


def test_the_page_has_every_option() -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    for verb, flag in FLAGS:
        section = next(section for section in sections if section.startswith(f"{verb}\n"))
        assert f"`{flag.key.upper() if flag.option.argument else flag.names[0]}" in section
        assert flag.option.help in section
