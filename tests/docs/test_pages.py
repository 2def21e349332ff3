"""What the documents say of files, options and names is there."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import eigenslice
from eigenslice.cli import app
from tests.docs.markdown import ALL, PAGES, ROOT, Command, anchors, commands, fences, links, name, spans

GROUP: Any = typer.main.get_command(app)
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
OURS = [command for command in COMMANDS if command.eigenslice]
SCRIPTS = [command for command in COMMANDS if command.words[0] == "python"]
SNIPPETS = [(name(page), snippet) for page in PAGES for snippet in fences(page, "python")]
FOREIGN = {"--help", "--nproc-per-node", "--nnodes", "--matmul", "--methods", "--sizes", "--with-detokenizer"}
FOREIGN |= {"--use_fsdp", "--fsdp_version", "--num_processes"}
"""Options of other programs, and of benchmarks."""
PATH = re.compile(r"(tests|benchmarks|src|docs|examples)/[\w./-]+")


def test_there_are_commands_and_snippets() -> None:
    assert len(OURS) > 20
    assert len(SCRIPTS) > 3
    assert len(SNIPPETS) > 2
    assert {command.page for command in OURS} >= {"README.md", "docs/tutorial.md", "docs/calibration.md"}


def test_the_readme_fits_on_its_first_pages() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", ALL, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_lead_to_files(page: Path) -> None:
    paths = [span for span in spans(page) if PATH.fullmatch(span) and "FAMILY" not in span]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", OURS, ids=str)
def test_commands_have_the_options_that_they_show(command: Command) -> None:
    words = command.eigenslice
    assert words
    verb, *arguments = words
    GROUP.commands[verb].make_context(verb, arguments)  # an unknown option or a wrong value is an exception


def test_an_unknown_option_would_be_found() -> None:
    with pytest.raises(Exception, match="--frobnicate"):
        GROUP.commands["slice"].make_context("slice", ["MODEL", "-o", "small", "--frobnicate"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_the_text_exist(page: Path) -> None:
    known = {option for verb in GROUP.commands.values() for parameter in verb.params for option in _names(parameter)}
    used = {word for span in spans(page) for word in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    assert used - known - FOREIGN == set()


def _names(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


@pytest.mark.parametrize("command", SCRIPTS, ids=str)
def test_scripts_have_the_options_that_they_show(command: Command) -> None:
    script = ROOT / command.words[1]
    text = script.read_text(encoding="utf-8")
    for word in command.words[2:]:
        if word.startswith("--"):
            assert f'"{word}"' in text, word


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {command.words[1] for command in COMMANDS if command.words[0] == "make"}
    assert targets >= {"demo", "test", "lint"}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_of_the_library_exist(page: Path) -> None:
    names = {found for span in spans(page) for found in re.findall(r"\beigenslice\.(\w+)\(", span)}
    assert [found for found in names if not hasattr(eigenslice, found)] == []


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS)
def test_snippets_compile_and_import(page: str, snippet: str) -> None:
    tree = ast.parse(snippet)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert imports, page
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
