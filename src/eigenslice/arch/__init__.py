"""Architectures as data: the schema, one table per family, and the look-up by `model_type`."""

from eigenslice.arch.registry import TABLES, has_table, lookup, register_table, table_of
from eigenslice.arch.schema import Refusal, StockForm, Sublayer, Table, Variant

__all__ = [
    "TABLES",
    "Refusal",
    "StockForm",
    "Sublayer",
    "Table",
    "Variant",
    "has_table",
    "lookup",
    "register_table",
    "table_of",
]
