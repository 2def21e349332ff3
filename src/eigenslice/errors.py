"""Everything eigenslice raises on purpose.

EigensliceError                  base: the command line prints it and exits with code 2
├── OptionsError                 options that contradict each other or are out of range
├── CheckpointError              a model folder, file or hub id that can't be read
├── UnsupportedModelError        an architecture, or a variant of one, that can't be sliced
├── CalibrationError             calibration or evaluation text that can't be used
├── ActivationError              NaN or infinite numbers while the model runs
├── ExportError                  an exported file that its runtime can't run as transformers runs the model
├── OutputError                  an output folder that can't be written
│   └── IncompleteError          a run that can't go on now: what is done is kept, for --resume
├── MemoryRanOutError            memory of a device or of the host ran out; a run's state is kept
└── RankError                    another process of the same run has failed
    └── EchoedError              the first one, which says itself why

Every message names the cause, the allowed values and the next step, each on one line.
"""

import re
from typing import Any

LONGEST_LINE = 300
"""Characters of another library's reason that are shown."""
LONGEST_PART = 5000
"""Characters of each of the three lines of a message: more than a path has."""
LONGEST_TEXT = 100_000
"""Characters that are searched for a reason."""
ANSI = re.compile(r"\x1b(?:\[[0-9:;<=>?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Sequences that a terminal obeys: colours, titles, links."""
WRAPPERS = ("DatasetGenerationError", "DatasetGenerationCastError")
"""Errors of datasets whose own text says nothing; the cause is the error that they were raised from."""


class EigensliceWarning(UserWarning):
    """Something that works, but not as well as the user may expect."""


class EigensliceError(Exception):
    """Base of all errors with a message meant for the user."""

    def __init__(self, found: str, *, allowed: str, next_step: str) -> None:
        parts = (printable(shortened(part, LONGEST_PART)) for part in (found, allowed, next_step))
        self.found, self.allowed, self.next_step = parts
        super().__init__(f"{self.found}\n  allowed: {self.allowed}\n  next:    {self.next_step}")


class OptionsError(EigensliceError):
    """Options that contradict each other or are out of range."""


class CheckpointError(EigensliceError):
    """A model folder, file or hub id that can't be read."""


class UnsupportedModelError(EigensliceError):
    """An architecture, or a variant of one, that can't be sliced exactly."""


class CalibrationError(EigensliceError):
    """Calibration or evaluation data that can't be used."""


class ActivationError(EigensliceError):
    """NaN or infinite numbers while the model runs."""


class ExportError(EigensliceError):
    """An exported file that its runtime can't run, or computes something else from."""


class OutputError(EigensliceError):
    """An output folder that can't be written."""


class IncompleteError(OutputError):
    """A run that can't go on now, such as on a full disk. Finished work is kept, to go on with --resume."""


class MemoryRanOutError(EigensliceError):
    """Memory of a device or of the host ran out. Says in which stage, and what to change."""


class RankError(EigensliceError):
    """Another process of the same run has failed."""


class EchoedError(RankError):
    """The first process has failed, and says itself why.

    Attributes:
        is_lasting: True if running the same command again would fail in the same way.
    """

    is_lasting = False


def first_line(error: BaseException) -> str:
    """The type of any error and, on one line, the cause that its text tells.

    Headings ("Class validation error for validator ...:"), empty and decorative lines are passed over. Colours and
    control characters are taken out, and long lines are cut.
    """
    error = cause_of(error)
    reason = printable(shortened(_reason(error).strip(), LONGEST_LINE))
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def cause_of(error: BaseException) -> BaseException:
    """Return the cause of an error whose own text says nothing, otherwise the error."""
    cause = error.__cause__ if type(error).__name__ in WRAPPERS else None
    return error if cause is None else cause_of(cause)


def printable(text: str) -> str:
    """A text on one line, with an escape in the place of each character that has no shape of its own.

    Such characters are line breaks, control characters, changes of the writing direction, and broken Unicode.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(value: object) -> str:
    """Return the text of a value in one short line."""
    return printable(shortened(" ".join(str(value).split()), LONGEST_LINE))


def shortened(text: str, longest: int) -> str:
    """A text of at most `longest` characters; the middle of a longer text is left out."""
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[len(text) - half :]}"


def _reason(error: BaseException) -> str:
    """The line of an error's text that tells the cause."""
    try:
        special: Any = error
        if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):  # pydantic's
            first = special.errors(include_url=False)[0]
            return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        if getattr(error, "problem_mark", None) is not None:  # yaml's first line only names its input
            mark = special.problem_mark
            return f"{special.problem} (line {mark.line + 1}, column {mark.column + 1})"
        text = str(error)[:LONGEST_TEXT]
    except Exception:  # an error whose text can't be made is still an error of its type
        return ""
    lines = [line.strip() for line in ANSI.sub("", text).splitlines()]
    lines = [line for line in lines if any(c.isalnum() for c in line)]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1]  # a traceback of another process
    return next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
