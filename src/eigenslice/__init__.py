"""eigenslice makes transformer language models smaller and faster by SliceGPT (arXiv 2401.15024).

Importing it lets transformers' `AutoModelForCausalLM` load sliced models of every form.
"""

from eigenslice import _interrupt as _interrupt
from eigenslice._version import __version__
from eigenslice.arch import Refusal, StockForm, Sublayer, Table, Variant, register_table
from eigenslice.errors import EigensliceError
from eigenslice.evaluation.perplexity import Perplexity, evaluate, perplexity
from eigenslice.export import Export, export_model
from eigenslice.healing import slice_model
from eigenslice.inspection.inspect import Inspection, inspect_model
from eigenslice.modeling import SlicedConfig, SlicedForCausalLM, register
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.exporting import ExportOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.slicing import SliceResult

register()

__all__ = [
    "CalibrationOptions",
    "EigensliceError",
    "Export",
    "ExportOptions",
    "Inspection",
    "Perplexity",
    "Refusal",
    "SliceOptions",
    "SliceResult",
    "SlicedConfig",
    "SlicedForCausalLM",
    "StockForm",
    "Sublayer",
    "Table",
    "Variant",
    "__version__",
    "evaluate",
    "export_model",
    "inspect_model",
    "perplexity",
    "register_table",
    "slice_model",
]
