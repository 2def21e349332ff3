"""Tables by `config.model_type`; never by a model's name."""

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

from eigenslice.arch import tables
from eigenslice.arch.schema import Table
from eigenslice.errors import UnsupportedModelError

TABLES: dict[str, Table] = {
    table.model_type: table
    for module in pkgutil.iter_modules(tables.__path__)
    for table in importlib.import_module(f"{tables.__name__}.{module.name}").TABLES
}

NORM_AFTER = frozenset(
    ("exaone4", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "glm4", "olmo2", "olmo3")
)
"""Types with a norm between a sublayer and the addition to the stream: gain(RMSN(W a)) Q is not gain(RMSN(W a Q))."""


def table_of(model_type: str) -> Table:
    """Return the table of a `model_type`.

    Raises:
        UnsupportedModelError: there is none.
    """
    known = isinstance(model_type, str)  # it comes from a file
    if known and model_type in NORM_AFTER:
        raise UnsupportedModelError(
            f"model_type {model_type!r} has norms after its sublayers (a sandwich norm), and such a norm doesn't "
            "commute with a rotation",
            allowed="model_type " + ", ".join(sorted(TABLES)),
            next_step="slice a model of one of these types",
        )
    table = TABLES.get(model_type) if known else None
    if table is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} has no architecture table, so eigenslice doesn't know what reads and "
            "writes its residual stream",
            allowed="model_type " + ", ".join(sorted(TABLES)),
            next_step="slice a model of one of these types, or add a table (see ARCHITECTURE.md)",
        )
    return table


def lookup(config: Any) -> Table:
    """Return the table of a transformers config, if this very model can be sliced.

    Raises:
        UnsupportedModelError: there is no table for this `model_type`, or the config is a variant that breaks
            the mathematics.
    """
    table = table_of(config.model_type)
    reasons = [refusal.reason for refusal in table.refusals if refusal.when(config)]
    if reasons:
        raise UnsupportedModelError(
            f"this {config.model_type!r} model can't be sliced: " + "; ".join(reasons),
            allowed=f"{config.model_type!r} models where every norm stands before its sublayer and the whole residual "
            "stream has one width",
            next_step="choose another checkpoint of this family",
        )
    for variant in table.variants:
        if variant.when(config):
            table = replace(table, **variant.changes)
    return table
