"""The results of families.py as a table, each family beside llama at the same share of block parameters."""

import math
from typing import Any

REFERENCE = "llama"
HEAD = (
    "type",
    "size",
    "saved as",
    "plan",
    "share of blocks",
    "KL",
    "perplexity",
    "excess over llama's",
    "KL over llama's",
    "narrowed by magnitude",
    "blocks dropped",
)
NUMBERS = {"width": "dense_width", "neurons": "dense_neurons", "key_value_heads": "dense_heads"}
"""Numbers of a plan, and the manifest's name of the dense model's."""


def section(result: dict[str, Any]) -> list[str]:
    """The lines of the section in docs/support.md."""
    tokens = sorted({row["trained"] for row in result["rows"]})
    return [
        "## Quality on trained models",
        "",
        "`python benchmarks/families.py` makes this table. Each model has one to two million parameters and was",
        "trained by `benchmarks/zoo.py`, in minutes, on "
        f"{' or '.join(f'{count / 1e6:g} M' for count in tokens)} tokens of TinyStories.",
        "Real models are trained longer: the figures compare families, and don't predict the loss of a real model.",
        "",
        "- Size: `--keep`, a share of the stored parameters. Share of blocks: the same of the blocks alone.",
        "- KL from the dense model in nats per token, and perplexity over the dense model's, on held-out stories.",
        "- Excess over llama's: (perplexity ratio - 1) over what llama has at the same share of blocks. llama's values",
        "  between two measured sizes are interpolated.",
        "- Narrowed by magnitude: perplexity ratio when channels with small weights are cut, with as many parameters.",
        "- Blocks dropped: the better perplexity ratio of two ways to drop whole blocks, with the share that is kept.",
        "",
        *table(result["rows"]).splitlines(),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a result."""
    good = [row for row in rows if "error" not in row]
    reference = [row for row in good if row["kind"] == REFERENCE]
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for row in rows:
        name = [f"`{row['kind']}`", f"{100 * row['keep']:g} %"]
        if "error" in row:
            lines.append(_line([*name, "-", row["error"].splitlines()[0].replace("|", "/"), *["-"] * (len(HEAD) - 4)]))
            continue
        magnitude = next(way for way in row["naive"] if way["way"] == "magnitude")
        dropped = min((way for way in row["naive"] if way is not magnitude), key=lambda way: way["ratio"])
        cells = [
            "custom" if row["form"] == "custom" else f"`{row['saved_as']}`",
            plan_text(row["plan"], row["dense"]),
            f"{100 * row['block_share']:.1f} %",
            f"{row['kl']:.3f}",
            f"{row['ratio']:.3f}",
            _times(excess(row), at_share(reference, row["block_share"], excess)),
            _times(row["kl"], at_share(reference, row["block_share"], _kl)),
            f"{magnitude['ratio']:.2f}",
            f"{dropped['ratio']:.2f} ({100 * dropped['block_share']:.0f} %)",
        ]
        lines.append(_line([*name, *cells]))
    return "\n".join(lines)


def excess(row: dict[str, Any]) -> float:
    """How much larger the perplexity is than the dense model's, as a share."""
    return row["ratio"] - 1


def _kl(row: dict[str, Any]) -> float:
    return row["kl"]


def at_share(reference: list[dict[str, Any]], share: float, loss: Any) -> float | None:
    """A loss of the reference at a share of block parameters.

    Between two measured shares, and beyond them, log(loss) is linear in log(1 - share): a cut of nothing costs nothing.

    Args:
        reference: Rows of the reference.
        share: Share of block parameters.
        loss: Gives a row's loss.

    Returns:
        The loss; None with fewer than two rows of positive loss, or where nothing is cut.
    """
    points = sorted((math.log(1 - row["block_share"]), math.log(loss(row))) for row in reference if loss(row) > 0)
    if len(points) < 2 or share >= 1:
        return None
    x = math.log(1 - share)
    after = next((index for index in range(1, len(points) - 1) if points[index][0] >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def plan_text(plan: dict[str, Any], dense: dict[str, Any]) -> str:
    """What of a model is left: each number that is smaller than the dense model's, and the blocks left out."""
    parts = []
    for name, value in plan.items():
        whole = dense.get(NUMBERS.get(name, f"dense_{name}"))
        if isinstance(whole, int) and not isinstance(value, bool):
            values = value if isinstance(value, list) else [value]
            if min(values) < whole:
                number = f"{min(values)}-{max(values)}" if min(values) < max(values) else str(values[0])
                parts.append(f"{name.replace('_', ' ')} {number} of {whole}")
    if plan.get("dropped_blocks"):
        parts.append(f"without blocks {', '.join(map(str, plan['dropped_blocks']))}")
    return ", ".join(parts)


def _times(value: float, reference: float | None) -> str:
    return f"x {value / reference:.2f}" if reference else "-"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
