"""The figures of written text, of `eval --generate --json`, as rows of a table."""

from collections.abc import Iterator
from typing import Any

NOTE = (
    "Repeated: share of 4-grams that were in the same text before. Sampled: drawn at temperature 1. "
    "Like the first model: tokens before the greedy texts differ."
)


def written_rows(content: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Label and a cell for each model.

    Args:
        content: The JSON, checked.
    """
    models = content["models"]
    for kind in ("greedy", "sampled"):
        yield f"repeated 4-grams, {kind} text", [_share(row[kind]["repeated"]) for row in models]
    first = models[0]["sampled"]["dense_perplexity"]
    seen = [row["sampled"]["dense_perplexity"] for row in models]
    ratios = ["", *(f" (x{value / first:.3f})" for value in seen[1:])]
    label = "first model's perplexity of sampled text"
    yield label, [f"{value:.2f}{ratio}" for value, ratio in zip(seen, ratios, strict=True)]
    for name in ("mean", "median"):
        cells = ["" if row["agreement"] is None else f"{row['agreement'][name]:.1f}" for row in models]
        yield f"greedy tokens like the first model, {name}", cells


def _share(value: float | None) -> str:
    """A share in per cent; nothing where no text is long enough."""
    return "" if value is None else f"{100 * value:.1f} %"
