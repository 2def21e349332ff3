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
└── RankError                    another process of the same run has failed

Every message says what was found, what is allowed, and what to do next.
"""


class EigensliceWarning(UserWarning):
    """Something that works, but not as well as the user may expect."""


class EigensliceError(Exception):
    """Base of all errors with a message meant for the user."""

    def __init__(self, found: str, *, allowed: str, next_step: str) -> None:
        self.found, self.allowed, self.next_step = found, allowed, next_step
        super().__init__(f"{found}\n  allowed: {allowed}\n  next:    {next_step}")


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
    """A run that can't go on now, such as on a full disk; what is done is kept, to go on with --resume."""


class RankError(EigensliceError):
    """Another process of the same run has failed."""


def first_line(error: BaseException) -> str:
    """The type of any error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
