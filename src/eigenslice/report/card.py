"""The model card in a result's folder, with the hub's metadata."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from eigenslice.report.story import (
    CUSTOM_NOTE,
    calibration_text,
    finetune_command,
    is_hub_id,
    loading_code,
    neurons_text,
    slice_command,
    source_name,
)

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")
"""Metadata that holds for the sliced model, too."""


def write_card(folder: Path, manifest: dict[str, Any], name: str, source_card: Path | None = None) -> None:
    """Write README.md into a result's folder.

    Args:
        folder: Where.
        manifest: The result's.
        name: What the model is called: the name of its folder.
        source_card: The dense model's card; licence and language are taken from it, if it is there.
    """
    metadata = _inherited(source_card)
    source = manifest["source"]["name"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source if is_hub_id(source) else None,
        tags=["eigenslice", "slicegpt", "pruned"] + ([] if manifest["form"] == "stock" else ["custom_code"]),
        **{key: metadata[key] for key in INHERITED if key in metadata},
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{_text(manifest, name)}"
    (folder / CARD).write_text(content, encoding="utf-8")


def _inherited(source_card: Path | None) -> dict[str, Any]:
    """Metadata of the dense model's card; none if there is no card, or one that the hub's client can't read."""
    if source_card is None or not source_card.is_file():
        return {}
    try:
        return ModelCard.load(source_card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _fewer(manifest: dict[str, Any]) -> list[str]:
    """Rows about key/value heads and blocks, if some were cut."""
    heads, dropped = manifest["plan"].get("key_value_heads"), manifest["plan"].get("dropped_blocks")
    rows = [] if heads is None else [f"| key/value heads per block | {manifest['dense_heads']} | {heads} |"]
    if dropped:
        dense, gone = manifest["dense_blocks"], ", ".join(map(str, dropped))
        rows.append(f"| blocks | {dense} | {dense - len(dropped)} (without {gone}, counted from 0) |")
    return rows


def _text(manifest: dict[str, Any], name: str) -> str:
    sizes, plan, source = manifest["parameters"], manifest["plan"], source_name(manifest)
    lines = [
        f"# {name}",
        "",
        f"{source}, made smaller by [eigenslice](https://arxiv.org/abs/2401.15024) {manifest['eigenslice']}: "
        f"{sizes['stored'] / 1e6:.1f} M of {sizes['dense'] / 1e6:.1f} M parameters ({100 * sizes['kept']:.1f} %).",
        "",
        "| | dense | sliced |",
        "| --- | --- | --- |",
        f"| parameters | {sizes['dense']:,} | {sizes['stored']:,} |",
        f"| hidden width | {manifest['dense_width']} | {plan['width']} |",
        f"| MLP neurons per block or expert | {manifest.get('dense_neurons') or ''} "
        f"| {neurons_text(plan['neurons'])} |",
        *_fewer(manifest),
        f"| basis | | {plan['basis']} |",
        f"| saved as | {manifest['source']['model_type']} | {manifest['model_type']} ({manifest['dtype']}) |",
        "",
        f"Calibrated on {calibration_text(manifest['calibration'])}.",
        "",
        "## Use",
        "",
        "```python",
        loading_code(manifest, name),
        "```",
        "",
        *([] if manifest["form"] == "stock" else [CUSTOM_NOTE, ""]),
        *_finetuned(manifest),
        "## How it was made",
        "",
        "```",
        slice_command(manifest),
        *([finetune_command(manifest["finetune"])] if "finetune" in manifest else []),
        "```",
        "",
        "`eigenslice.json` holds the plan, the spectra, all options, and the SHA-256 of the source's files. A sliced "
        "model is worst on kinds of text that it was not calibrated on: measure it on yours (`eigenslice eval`).",
        "",
    ]
    return "\n".join(lines)


def _finetuned(manifest: dict[str, Any]) -> list[str]:
    section = manifest.get("finetune")
    if not section:
        return []
    measured, teacher = section["perplexity"], section["teacher"]
    change = f"{measured['before']:.2f} → {measured['after']:.2f}"
    return [
        "## Recovery fine-tuning",
        "",
        f"{section['trained']}, {section['steps']} steps on {calibration_text(section['data'])}"
        + (f"; distilled from {Path(teacher).name}" if teacher else "")
        + f". Perplexity on {measured['tokens']:,} held-out tokens: {change}.",
        "",
    ]
