"""Calibration and evaluation tokens: texts from files, presets and the hub, cut into sequences."""

from eigenslice.data.tokens import Tokens, calibration_tokens, evaluation_tokens, random_sequences

__all__ = ["Tokens", "calibration_tokens", "evaluation_tokens", "random_sequences"]
