"""The public surface is small and on purpose."""

import eigenslice

PUBLIC = [
    "CalibrationOptions",
    "EigensliceError",
    "Export",
    "ExportOptions",
    "Inspection",
    "Perplexity",
    "SliceOptions",
    "SliceResult",
    "SlicedConfig",
    "SlicedForCausalLM",
    "__version__",
    "evaluate",
    "export_model",
    "inspect_model",
    "perplexity",
    "slice_model",
]


def test_public_names() -> None:
    assert eigenslice.__all__ == PUBLIC
    assert all(hasattr(eigenslice, name) for name in PUBLIC)
