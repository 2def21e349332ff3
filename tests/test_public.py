"""The public surface is small and on purpose."""

import eigenslice

PUBLIC = [
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


def test_public_names() -> None:
    assert eigenslice.__all__ == PUBLIC
    assert all(hasattr(eigenslice, name) for name in PUBLIC)
