"""The head of docs/support.md: which types there are, what their results are saved as, and what the tests check."""

from tests import tiny

from eigenslice.arch import TABLES, Table
from eigenslice.arch.tables import hybrids
from eigenslice.checkpoint.towers import TOWERS

KINDS = {
    "stock": "**stock**",
    "experts": "stock, experts",
    "layer norms": "stock, LayerNorms",
    "recurrent": "stock, recurrent layers",
    "custom": "**custom class**",
    "post norms": "custom class, norms after sublayers",
}
"""Groups of types by the form of their results, in the order of the page."""

NOTES = {
    "llama": "saved as Mistral where the hidden size doesn't divide by the number of heads",
    "qwen2": "saved as Llama with attention bias, which llama.cpp and vLLM run at these hidden sizes",
    "gemma4_text": "31B; E2B, E4B and the variant with experts are refused",
}
"""What is special about a type."""

BEFORE = """\
# What is supported

eigenslice slices decoder-only language models of these {count} `model_type`s.

- A **stock** result loads in transformers without eigenslice.
- A result in the **custom class** needs `import eigenslice` first. Where eigenslice isn't installed, pass
  `trust_remote_code=True`: the folder carries the one file that it takes.
- Per-block results (`--basis per-block`) and results of `--form custom` need the custom class for every type.

| result | types (`model_type`) |
| --- | --- |
"""

AFTER = """
- LayerNorm models with tied embeddings need the custom class where the hidden size is cut. `--untie` keeps them stock.
- Experts lose hidden size and neurons, and whole experts go (`--experts`, or `--keep` by itself), with their rows of
  the router. Shared experts and dense layers stay; groups of experts stay equally large.
- Some types tie the width of the attention to the hidden size (OPT, GPT-2), and some norm what a sublayer adds to the
  stream (Gemma 2). Stock configs hold their results at the whole hidden size: neurons, heads, blocks and experts go.
- Other types are refused in one line that says why. Variants that break the mathematics are refused, too (OPT-350m).
- A table of your own needs no fork: [ARCHITECTURE.md](../ARCHITECTURE.md#how-to-add-a-family).

These types read images beside text: {towers}.
eigenslice slices the language model alone, if its own type is in the table above, and says so.

## What is tested

Every commit tests the following for each type:

- At full hidden size the transformed model gives the dense model's logits: in float32, within 1e-4 of the largest
  magnitude. This holds for both bases, stock and custom, tied and untied, with padding, and token by token through the
  cache.
- Sliced models equal an independent float64 implementation of the paper.
- The stored parameters are the counted ones.
- Stock results of the first types (Llama, Mistral, Qwen, Phi) give the same logits and tokens in transformers 4.57. The
  matrix below says which of the other types do.
"""


def head(results: dict[str, dict[str, str]]) -> str:
    """The Markdown above the matrix; results hold for each case what it is saved as."""
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for model_type, table in TABLES.items():
        if saved := _saved(model_type, results):
            groups[_kind(table, saved)].append(_named(model_type))
    rows = [f"| {KINDS[kind]} | {', '.join(types)} |\n" for kind, types in groups.items() if types]
    towers = ", ".join(f"`{name}`" for name in TOWERS)
    return BEFORE.format(count=len(TABLES)) + "".join(rows) + AFTER.format(towers=towers)


def _saved(model_type: str, results: dict[str, dict[str, str]]) -> set[str]:
    """Forms of the results of all variants of a type."""
    cases = [case for case, variant in tiny.CASES.items() if variant.model_type == model_type]
    return {results[case]["saved"] for case in cases if case in results}


def _kind(table: Table, saved: set[str]) -> str:
    """The group of a type; a type with one stock variant is stock."""
    if saved == {"custom"}:
        return "post norms" if table.attention.post_norm else "custom"
    if table in hybrids.TABLES:
        return "recurrent"
    if table.mlp.stacked:
        return "experts"
    return "layer norms" if table.norm == "layer" else "stock"


def _named(model_type: str) -> str:
    note = NOTES.get(model_type)
    return f"`{model_type}` ({note})" if note else f"`{model_type}`"
