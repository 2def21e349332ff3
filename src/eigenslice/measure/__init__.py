"""Importance of directions and neurons, and the divergence of two models."""
