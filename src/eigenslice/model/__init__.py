"""The dense model in canonical form, one block at a time."""
