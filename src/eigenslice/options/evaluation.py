"""Options of `eigenslice eval`."""

from importlib.util import find_spec
from typing import Annotated

from pydantic import model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.common import Device, RunDtype, TrustCheckpoint
from eigenslice.options.flags import TASKS, TEXT, Nested, Option, Options, Range
from eigenslice.options.paths import UserPath

TEXT_TO_PREDICT: dict[str, Option | None] = {
    "data": Option(
        "Text to predict: builtin, wikitext2, c4, alpaca, ptb, fineweb-edu, tinystories, code (their held-out "
        "parts), mixed (one after another), a file (as slice's --calibration), or a hub data set "
        "NAME[:CONFIG[:SPLIT]]. Several: a perplexity for each.",
        TEXT,
    ),
    "field": Option(
        "Text field of records or tensor of a file, as slice's --field; once, or once for each text.",
        TEXT,
        "text, or else a conversation",
    ),
    "samples": Option("Windows of each text, from its start.", TEXT),
    "seqlen": Option("Tokens per window.", TEXT),
}


class PerplexityOptions(Options):
    """Text to predict, and how models run on it."""

    text: Annotated[CalibrationOptions, Nested(TEXT_TO_PREDICT)] = CalibrationOptions(data="wikitext2")
    device: Device = None
    dtype: RunDtype = None
    trust_remote_code: TrustCheckpoint = False


class TaskOptions(Options):
    """Questions to models."""

    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Instead of perplexity: tasks or groups of lm-eval, joined by commas, such as piqa,arc_easy.",
            TASKS,
            joined=True,
        ),
    ]
    include_path: Annotated[
        UserPath | None, Option("Folder of task files (YAML) of your own, for --tasks.", TASKS, "none")
    ] = None
    fewshot: Annotated[
        int | None,
        Option("Examples before each question.", TASKS, "the task's own number"),
        Range(0, 10**4, "0 to 10000 examples"),
    ] = None
    limit: Annotated[
        int | None,
        Option("Questions of each task, from its start.", TASKS, "all"),
        Range(1, 10**9, "1 to 10^9 questions"),
    ] = None
    batch: Annotated[
        int, Option("Sequences at once, for --tasks.", TASKS), Range(1, 10**6, "1 to 1000000 sequences")
    ] = 8
    chat: Annotated[bool, Option("Ask tasks in the models' chat templates.", TASKS)] = False
    device: Device = None
    dtype: RunDtype = None
    trust_remote_code: TrustCheckpoint = False

    @model_validator(mode="after")
    def _check(self) -> "TaskOptions":
        if find_spec("lm_eval") is None:
            raise OptionsError(
                "lm-eval is not installed",
                allowed="an environment with the packages that tasks need",
                next_step="pip install 'eigenslice[eval]'",
            )
        if not self.tasks:
            raise OptionsError("no task was named", allowed="one or more", next_step="for example --tasks piqa")
        if self.include_path is not None and not self.include_path.is_dir():
            raise OptionsError(
                f"--include-path {self.include_path} is no folder",
                allowed="a folder of task files (YAML)",
                next_step="check the path",
            )
        return self
