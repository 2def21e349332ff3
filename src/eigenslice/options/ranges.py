"""Ranges of numbers that a user chooses."""

from typing import Any

from eigenslice.errors import OptionsError

Limits = dict[str, tuple[float, float, str]]
"""For each field the smallest and the largest value, and the range in words. Nothing is NaN or infinite."""
FLAGS = {"shard_gib": "shard-size"}
"""Fields whose options have another name."""
SEED = (0, 2**63 - 1, "0 to 2^63 - 1")


def check_ranges(options: Any, limits: Limits) -> None:
    """Refuse numbers out of range; None stands for a default.

    Raises:
        OptionsError: it names the first such option and its range.
    """
    for name, (low, high, allowed) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise OptionsError(
                f"--{FLAGS.get(name, name.replace('_', '-'))} {value}",
                allowed=allowed,
                next_step="leave it out for the default",
            )
