"""Fitting the sliced layers beside the dense residual stream."""
