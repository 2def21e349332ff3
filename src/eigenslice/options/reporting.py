"""Options of `eigenslice report`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.common import GPU, LONGEST, TrustCheckpoints
from eigenslice.options.flags import MACHINE, MEASUREMENTS, OUTPUT, TEXT, Option, Options, Range
from eigenslice.options.paths import UserPath

PROMPTS = (
    "The most important thing about a good library is",
    "Once upon a time, there was a little girl who",
    "Water boils at",
)


class ReportOptions(Options):
    """Contents of a report."""

    folder: Annotated[UserPath, Option("A folder that eigenslice wrote.", argument=True)]
    output: Annotated[
        UserPath | None,
        Option(
            "HTML file to write. A report is replaced, another file never.",
            OUTPUT,
            "FOLDER-report.html beside the folder",
            ("--output", "-o"),
        ),
    ] = None
    perplexity: Annotated[
        UserPath | None, Option("JSON of eigenslice eval --json, or of benchmarks/quality.py.", MEASUREMENTS, "none")
    ] = None
    tasks: Annotated[UserPath | None, Option("JSON of eigenslice eval --tasks ... --json.", MEASUREMENTS, "none")] = (
        None
    )
    writing: Annotated[
        UserPath | None, Option("JSON of eigenslice eval --generate ... --json.", MEASUREMENTS, "none")
    ] = None
    bench: Annotated[UserPath | None, Option("JSON of eigenslice bench --json.", MEASUREMENTS, "none")] = None
    generate: Annotated[str | None, Option("The dense model: show text that both models write.", TEXT, "no text")] = (
        None
    )
    prompts: Annotated[
        tuple[str, ...],
        Option("A prompt for --generate; may be repeated.", TEXT, "three prompts", ("--prompt",)),
    ] = PROMPTS
    new: Annotated[
        int, Option("Tokens to write after each prompt.", TEXT), Range(1, LONGEST, f"1 to {LONGEST} tokens")
    ] = 60
    device: Annotated[str | None, Option("torch device for --generate.", MACHINE, GPU)] = None
    trust_remote_code: TrustCheckpoints = False

    @model_validator(mode="after")
    def _check(self) -> "ReportOptions":
        if find_spec("plotly") is None:
            raise OptionsError(
                "plotly is not installed",
                allowed="an environment with the packages that reports need",
                next_step="pip install 'eigenslice[report]'",
            )
        if not self.prompts:
            raise OptionsError(
                "no --prompt", allowed="at least 1 prompt", next_step="leave the option out for the defaults"
            )
        return self

    @property
    def path(self) -> Path:
        """Path of the report."""
        folder = self.named_folder
        return self.output or folder.absolute().parent / f"{folder.absolute().name}-report.html"

    @property
    def named_folder(self) -> Path:
        """The folder by a path that ends in a name: "." and ".." have none."""
        return self.folder.resolve() if self.folder.name in ("", "..") else self.folder
