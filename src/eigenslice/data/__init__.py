"""Calibration and evaluation tokens: texts from files, presets and the hub, cut into sequences."""

from eigenslice.data.extra_sequences import beginnings, random_sequences
from eigenslice.data.tokens import Tokens, calibration_tokens, evaluation_tokens

__all__ = ["Tokens", "beginnings", "calibration_tokens", "evaluation_tokens", "random_sequences"]
