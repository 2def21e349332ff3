"""The residual stream of the dense model, block by block."""
