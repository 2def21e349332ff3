"""Options of `eigenslice eval --tasks`."""

from importlib.util import find_spec

from pydantic import BaseModel, ConfigDict, model_validator

from eigenslice.errors import OptionsError
from eigenslice.options.common import DtypeName
from eigenslice.options.paths import UserPath
from eigenslice.options.ranges import Limits, check_ranges

LIMITS: Limits = {
    "fewshot": (0, 10**4, "0 to 10000 examples"),
    "limit": (1, 10**9, "1 to 10^9 questions"),
    "batch": (1, 10**6, "1 to 1000000 sequences"),
}


class TaskOptions(BaseModel):
    """What models are asked.

    Attributes:
        tasks: Names of lm-eval's tasks or groups, or of those in `include_path`.
        include_path: A folder of task files (YAML) of your own.
        fewshot: Examples before each question; None is the task's own number.
        limit: Questions of each task, from its start; None is all.
        batch: Sequences at once.
        chat: Ask in the models' chat templates.
        device: torch device; None is a GPU if there is one.
        dtype: None is the stored one on a GPU and float32 on CPU.
        trust_remote_code: Let the checkpoints run code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...]
    include_path: UserPath | None = None
    fewshot: int | None = None
    limit: int | None = None
    batch: int = 8
    chat: bool = False
    device: str | None = None
    dtype: DtypeName | None = None
    trust_remote_code: bool = False

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
        check_ranges(self, LIMITS)
        return self
