"""Slicing and then training in one run: `slice --heal`."""

from eigenslice.healing.heal import slice_model

__all__ = ["slice_model"]
