"""Tables by `config.model_type`; never by a model's name."""

import importlib
import pkgutil
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from transformers.models.auto import modeling_auto

from eigenslice.arch import tables
from eigenslice.arch.schema import Table
from eigenslice.errors import OptionsError, UnsupportedModelError

TABLES: dict[str, Table] = {
    table.model_type: table
    for module in pkgutil.iter_modules(tables.__path__)
    for table in importlib.import_module(f"{tables.__name__}.{module.name}").TABLES
}

ENTRY_POINTS = "eigenslice.tables"
"""Group of entry points under which other packages offer tables; an entry point's name is the model type."""

RECURRENT = "has recurrent layers beside attention, whose state and caches no test covers yet"
REFUSED = {
    "gemma3n_text": "carries several residual streams side by side",
    "mamba": "has no attention: its state-space layers aren't described by a table yet",
    "mamba2": "has no attention: its state-space layers aren't described by a table yet",
    "jamba": RECURRENT,
    "falcon_h1": RECURRENT,
}
"""Reasons why some types have no table."""

KINDS = (
    (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "reads images beside text, and its language model isn't known",
    ),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "is an encoder-decoder, not a decoder alone"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "is an encoder-decoder, not a decoder alone"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "is an encoder, not a decoder"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "is a vision model, not a language model"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "has no architecture table yet"),
)
"""transformers' lists of types, and for each list the reason why its types have no table."""


def register_table(table: Table) -> None:
    """Make a table known, so that models of its type can be sliced.

    A package can do the same by an entry point of the group "eigenslice.tables", named after the type; the command line
    then finds it, too.

    Raises:
        OptionsError: there is one for this type.
    """
    if table.model_type in TABLES:
        raise OptionsError(
            f"model_type {table.model_type!r} has a table already",
            allowed="one table a type",
            next_step="change that one, in a copy under another model_type",
        )
    TABLES[table.model_type] = table


def _find(model_type: Any) -> Table | None:
    if not isinstance(model_type, str):  # it comes from a file
        return None
    return TABLES.get(model_type) or next(
        (entry.load() for entry in entry_points(group=ENTRY_POINTS, name=model_type)), None
    )


def has_table(model_type: Any) -> bool:
    """Return whether models of a `model_type` can be sliced."""
    return _find(model_type) is not None


def table_of(model_type: str) -> Table:
    """Return the table of a `model_type`.

    Raises:
        UnsupportedModelError: there is none.
    """
    table, known = _find(model_type), isinstance(model_type, str)
    if table is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} {_why_not(model_type) if known else 'is no name'}",
            allowed=f"one of the {len(TABLES)} types in docs/support.md",
            next_step="slice a model of one of these types, or add a table (see ARCHITECTURE.md)",
        )
    return table


def _why_not(model_type: str) -> str:
    kinds = (why for names, why in KINDS if model_type in getattr(modeling_auto, names))
    return REFUSED.get(model_type) or next(kinds, "is no language model that transformers knows")


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
            allowed=f"{config.model_type!r} models of which every sublayer reads one norm of the stream and adds to it",
            next_step="choose another checkpoint of this family",
        )
    for variant in table.variants:
        if variant.when(config):
            table = replace(table, **variant.changes)
    return table
