"""Options of `eigenslice inspect`."""

from typing import Annotated

from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.common import GPU, TrustTokenizer
from eigenslice.options.flags import CALIBRATION, MACHINE, Nested, Option, Options


class InspectOptions(Options):
    """A model to look at, and the run that is estimated."""

    model: Annotated[str, Option("A folder, a hub id or a .gguf file.", argument=True)]
    calibration: Annotated[
        CalibrationOptions,
        Nested({"samples": Option("Calibration sequences of the estimate.", CALIBRATION), "seqlen": None}),
    ] = CalibrationOptions()
    device: Annotated[str | None, Option("torch device of the estimate.", MACHINE, GPU)] = None
    trust_remote_code: TrustTokenizer = False
