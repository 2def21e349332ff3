"""Options of `eigenslice report`."""

from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration import LONGEST
from eigenslice.options.paths import UserPath
from eigenslice.options.ranges import check_ranges

PROMPTS = (
    "The most important thing about a good library is",
    "Once upon a time, there was a little girl who",
    "Water boils at",
)


class ReportOptions(BaseModel):
    """What goes into a report.

    Attributes:
        folder: A result of `slice` or `finetune`.
        output: The HTML file; None is FOLDER-report.html beside the folder. A report is replaced, another file never.
        perplexity: JSON of `eval --json` or benchmarks/quality.py.
        tasks: JSON of `eval --tasks --json`.
        bench: JSON of `bench --json`.
        generate: The dense model, to write samples beside the sliced one's.
        prompts: What both go on from.
        new: Tokens that they write.
        device: torch device for that; None is a GPU if there is one.
        trust_remote_code: Let the checkpoints run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: UserPath
    output: UserPath | None = None
    perplexity: UserPath | None = None
    tasks: UserPath | None = None
    bench: UserPath | None = None
    generate: str | None = None
    prompts: tuple[str, ...] = PROMPTS
    new: int = 60
    device: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ReportOptions":
        if find_spec("plotly") is None:
            raise OptionsError(
                "plotly is not installed",
                allowed="an environment with the packages that reports need",
                next_step="pip install 'eigenslice[report]'",
            )
        check_ranges(self, {"new": (1, LONGEST, f"1 to {LONGEST} tokens")})
        if not self.prompts:
            raise OptionsError(
                "no --prompt", allowed="at least 1 prompt", next_step="leave the option out for the defaults"
            )
        return self

    @property
    def path(self) -> Path:
        """Where the report goes."""
        folder = self.named_folder
        return self.output or folder.absolute().parent / f"{folder.absolute().name}-report.html"

    @property
    def named_folder(self) -> Path:
        """The folder by a path that ends in a name: "." and ".." have none."""
        return self.folder.resolve() if self.folder.name in ("", "..") else self.folder
