"""Slicing a checkpoint: the algorithm, and the last pass for each basis."""

from eigenslice.slicing.slice import SliceResult, slice_model

__all__ = ["SliceResult", "slice_model"]
