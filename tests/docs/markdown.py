"""The documents, and what is in them: commands, snippets, links, headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, *sorted((ROOT / "benchmarks").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHELL = ("", "sh", "bash", "console")
PROMPT = "$ "


@dataclass(frozen=True)
class Command:
    """A command of a document, as words; `to` is the file that its output is sent to."""

    page: str
    words: tuple[str, ...]
    to: str | None = None

    @property
    def eigenslice(self) -> tuple[str, ...] | None:
        """The words after `eigenslice`, also of a run under torchrun; None for another program."""
        if self.words[0] == "eigenslice":
            return self.words[1:]
        if self.words[0] == "torchrun" and "eigenslice" in self.words:
            return self.words[self.words.index("eigenslice") + 1 :]
        return None

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path, *languages: str) -> list[str]:
    """Contents of the blocks in these languages, in their order."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    """A document without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands in code type within the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[Command]:
    """Commands of all blocks. In a block with prompts, only lines with a prompt are commands."""
    found = []
    for body in fences(page, *SHELL):
        lines = re.sub(r"\\\n\s*", "", body).splitlines()
        if any(line.startswith(PROMPT) for line in lines):
            lines = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
        found += [_command(page, line) for line in lines if re.match(r"(eigenslice|torchrun|python|make) ", line)]
    return found


def _command(page: Path, line: str) -> Command:
    words = shlex.split(line, comments=True)
    to = words[words.index(">") + 1] if ">" in words else None
    return Command(name(page), tuple(words[: words.index(">")] if to else words), to)


def links(page: Path) -> list[str]:
    """Targets of links that aren't addresses."""
    return [target for target in LINK.findall(prose(page)) if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """Names by which GitHub links to headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
