"""The dimensions that each type can lose, tried on tiny models, for docs/support.md.

A cell is "yes" if the result loads, stores the numbers that the manifest says, and gives the same logits token by token
through the cache. Without fits and at full width, heads, blocks and (outside of mixtures) neurons must leave the dense
model without these parts; the two forms of a result must agree.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from tests import kept_units, tiny
from tests.results import load, size

from eigenslice import CalibrationOptions, SliceOptions, slice_model
from eigenslice.errors import EigensliceError, first_line
from eigenslice.model.anatomy import Anatomy
from eigenslice.plan.forms import FormChoice
from support_runtimes import failure

DIMENSIONS = {
    "width": "hidden size",
    "neurons": "neurons",
    "heads": "heads",
    "blocks": "blocks",
    "experts": "experts",
}
FORMS: tuple[FormChoice, ...] = ("stock", "custom")
DROPPED = 2
"""Number of the block that is left out: in models with recurrent blocks, block 1 is the one with attention."""
NONE = "-"
"""The cell of a dimension that the type doesn't have."""


class Cuts:
    """One case, cut in each dimension and saved in each form."""

    def __init__(self, case: str, folder: Path) -> None:
        self.case, self.folder = tiny.CASES[case], folder
        more = (
            {"num_experts": 8, "n_routed_experts": 8} if "n_group" in self.case.extra else {}
        )  # a group keeps at least two
        model = tiny.tiny_model(self.case.model_type, self.case.config | self.case.extra | more)
        self.dense = tiny.save(model, folder / "dense")
        self.anatomy = Anatomy.of_config(model.config)
        self.calibration = tiny.calibration_file(folder)

    def cells(self) -> dict[str, str]:
        """A cell for each dimension and form."""
        result = {}
        for dimension in DIMENSIONS:
            plan = self._plan(dimension)
            found: dict[str, torch.Tensor] = {}
            for form in FORMS:
                result[f"{dimension}, {form}"] = NONE if plan is None else self._cell(dimension, plan, form, found)
        return result

    def _plan(self, dimension: str) -> dict[str, Any] | None:
        """Return a recipe that cuts one dimension; None if the type doesn't have it."""
        anatomy, whole = self.anatomy, {"width": tiny.WIDTH}
        if dimension == "width":
            return {"width": 24}
        if dimension == "neurons":
            return whole | {"neurons": anatomy.neuron_count - 8}
        if dimension == "heads":
            counts = anatomy.head_counts
            if counts is None:
                return whole | {"key_value_heads": 1}
            if counts.kv == 1:
                return whole | {"query_heads": counts.queries - 1}
            kept = counts.kv - anatomy.table.heads_step
            while tiny.WIDTH % (kept * counts.group) and not anatomy.table.heads_span_width:
                kept -= 1  # some classes want the hidden size to be a multiple of the number of heads
            return whole | {"key_value_heads": kept}
        if dimension == "blocks":
            return whole | {"dropped_blocks": [DROPPED]}
        return whole | {"experts": anatomy.expert_count - anatomy.expert_groups} if anatomy.table.mlp.stacked else None

    def _cell(self, dimension: str, plan: dict[str, Any], form: FormChoice, found: dict[str, torch.Tensor]) -> str:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(plan))
        try:
            result = slice_model(
                SliceOptions(
                    model=str(self.dense),
                    output=self.folder / f"{dimension}-{form}",
                    calibration=CalibrationOptions(data=str(self.calibration)),
                    recipe=recipe,
                    refit=False,
                    form=form,
                )
            )
        except EigensliceError as error:
            return failure(self._reason(dimension, error))
        try:
            sliced = load(result.output)
            if size(sliced) != result.manifest["parameters"]["stored"]:
                return f"no: stores {size(sliced)}"
            kept_units.check_cache(sliced)
            with torch.no_grad():
                found[form] = sliced(kept_units.IDS).logits
            if len(found) == len(FORMS):  # the same basis, and the same parts
                difference = float((found[FORMS[0]] - found[FORMS[1]]).abs().max() / found[form].abs().max())
                assert difference <= 1e-4 or self._own(plan), f"the forms differ by {difference:.1e}"
            self._compare(dimension, sliced)
        except Exception as error:  # whatever a model raises is the cell's content
            return failure(f"{type(error).__name__}: {first_line(error)}")
        return "yes"

    def _own(self, plan: dict[str, Any]) -> bool:
        """Return whether the forms differ in width: a stock LayerNorm costs one dimension."""
        return self.anatomy.layer_norm and plan["width"] < tiny.WIDTH

    def _compare(self, dimension: str, sliced: Any) -> None:
        """Compare a result with the dense model without the parts that are cut."""
        model, anatomy = load(self.dense), self.anatomy
        table = anatomy.table
        if dimension == "heads" and anatomy.head_counts:
            kept_units.kept_units(model, sliced, table, table.attention, anatomy.head_counts.queries)
        elif dimension == "neurons" and not table.mlp.stacked:
            kept_units.kept_units(model, sliced, table, table.mlp, anatomy.neuron_count)
        elif dimension == "blocks":
            layer = model.get_submodule(table.layers)[DROPPED]
            gives_tuple = table.layers_give_tuples
            layer.forward = lambda hidden, *_, **__: (hidden, None) if gives_tuple else hidden
        else:
            return
        kept_units.check_logits(model, sliced)

    def _reason(self, dimension: str, error: EigensliceError) -> str:
        """The reason in a few words."""
        if dimension == "heads" and not self.anatomy.kv_head_count:
            return self.anatomy.table.attention.why_no_heads
        reasons = re.split(r"hold width \d+: ", error.found)[-1]
        return re.sub(r", \d+$", "", reasons.rpartition("; ")[2].removeprefix(f"{self.case.model_type}: "))


def section(results: dict[str, dict[str, str]]) -> list[str]:
    """The Markdown of the table; results hold the cells of each case."""
    lines = [
        "## What can be cut",
        "",
        "Each cell was tried on a tiny model: *stock / custom class*. `--form` picks one. The first variant of each",
        "type was run. Neurons, heads, blocks and experts were cut at full hidden size. Where a type has one key/value",
        "head, its query heads were cut.",
        "",
        "| type | " + " | ".join(DIMENSIONS.values()) + " |",
        "| --- " * (len(DIMENSIONS) + 1) + "|",
    ]
    reasons: dict[str, int] = {}
    done = set()
    for case, variant in tiny.CASES.items():
        cells = results.get(case, {})
        if variant.model_type in done or f"width, {FORMS[0]}" not in cells:
            continue
        done.add(variant.model_type)
        row = []
        for dimension in DIMENSIONS:
            parts = [_short(cells.get(f"{dimension}, {form}", NONE), reasons) for form in FORMS]
            row.append(parts[0] if parts[0] == parts[1] == NONE else " / ".join(parts))
        lines.append(f"| `{variant.model_type}` | " + " | ".join(row) + " |")
    return [*lines, "", *(f"- ({number}) {reason}" for reason, number in reasons.items()), ""] if done else []


def _short(cell: str, reasons: dict[str, int]) -> str:
    """A cell with the number of its reason."""
    word, colon, reason = cell.partition(": ")
    return f"{word} ({reasons.setdefault(reason, len(reasons) + 1)})" if colon else word
