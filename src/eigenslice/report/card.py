"""The model card in a result's folder, with the hub's metadata."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from eigenslice.checkpoint.card_metadata import read_card_metadata
from eigenslice.report.escape import markdown
from eigenslice.report.stated_loss import is_older_than_training, kl_text, loss_warning, why_not_measured
from eigenslice.report.story import (
    base_model,
    calibration_text,
    custom_note,
    finetune_commands,
    loading_code,
    neurons_text,
    slice_command,
    source_name,
    vocabulary_text,
)

__all__ = ["CARD", "read_card_metadata", "write_card"]
CARD = "README.md"


def write_card(folder: Path, manifest: dict[str, Any], name: str, metadata: dict[str, Any] | None = None) -> None:
    """Write README.md into a result's folder.

    Args:
        folder: The result's folder.
        manifest: The result's manifest.
        name: Name of the model, which is the name of its folder.
        metadata: Metadata of the dense model's card, see `read_card_metadata`; None for no metadata.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model(manifest["source"]["name"]),
        tags=["eigenslice", "slicegpt", "pruned"] + ([] if manifest["form"] == "stock" else ["custom_code"]),
        **(metadata or {}),
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{_text(manifest, name)}"
    (folder / CARD).write_text(content, encoding="utf-8")


def _fewer(manifest: dict[str, Any]) -> list[str]:
    """Rows about tokens, experts, heads and blocks, if some were cut."""
    heads, dropped = manifest["plan"].get("key_value_heads"), manifest["plan"].get("dropped_blocks")
    queries = manifest["plan"].get("query_heads")
    rows = []
    if "vocabulary" in manifest:
        section = manifest["vocabulary"]
        rows.append(f"| tokens in the vocabulary | {section['dense']:,} | {section['kept']:,} |")
    experts = manifest["plan"].get("experts")
    rows += [] if experts is None else [f"| experts per mixture | {manifest['dense_experts']} | {experts} |"]
    rows += [] if heads is None else [f"| key/value heads per block | {manifest['dense_heads']} | {heads} |"]
    rows += [] if queries is None else [f"| query heads per block | {manifest['dense_query_heads']} | {queries} |"]
    if dropped:
        dense, gone = manifest["dense_blocks"], ", ".join(map(str, dropped))
        rows.append(f"| blocks | {dense} | {dense - len(dropped)} (without {gone}, counted from 0) |")
    return rows


def _loss(manifest: dict[str, Any]) -> str:
    """Return the row about the loss on held-out text."""
    loss = manifest.get("loss") or {}
    if "kl" not in loss:
        return f"| loss on held-out text | | not measured: {markdown(why_not_measured(manifest))} |"
    before = ", before fine-tuning" if is_older_than_training(manifest) else ""
    return (
        f"| perplexity on {loss['tokens']:,} held-out tokens of the calibration text{before} "
        f"| {loss['dense_perplexity']:.4g} "
        f"| {loss['sliced_perplexity']:.4g} (x{loss['perplexity_ratio']:.3f}; {kl_text(loss)}) |"
    )


def _warned(manifest: dict[str, Any]) -> list[str]:
    """Return the paragraph on a large loss; fine-tuning has changed the loss."""
    text = "" if is_older_than_training(manifest) else loss_warning(manifest)
    return [f"**Large loss.** {markdown(text)}", ""] if text else []


def _text(manifest: dict[str, Any], name: str) -> str:
    sizes, plan, source = manifest["parameters"], manifest["plan"], markdown(source_name(manifest), starts=True)
    lines = [
        f"# {markdown(name)}",
        "",
        f"{source}, made smaller by [eigenslice](https://arxiv.org/abs/2401.15024) {markdown(manifest['eigenslice'])}: "
        f"{sizes['stored'] / 1e6:.1f} M of {sizes['dense'] / 1e6:.1f} M parameters ({100 * sizes['kept']:.1f} %).",
        "",
        "| | dense | sliced |",
        "| --- | --- | --- |",
        f"| parameters | {sizes['dense']:,} | {sizes['stored']:,} |",
        _loss(manifest),
        f"| hidden width | {manifest['dense_width']} | {plan['width']} |",
        f"| MLP neurons per block or expert | {manifest.get('dense_neurons') or ''} "
        f"| {neurons_text(plan['neurons'])} |",
        *_fewer(manifest),
        f"| basis | | {plan['basis']} |",
        f"| saved as | {markdown(manifest['source']['model_type'])} "
        f"| {markdown(manifest['model_type'])} ({manifest['dtype']}) |",
        "",
        f"Calibrated on {markdown(calibration_text(manifest['calibration']))}.",
        "",
        *_warned(manifest),
        *([markdown(vocabulary_text(manifest["vocabulary"])), ""] if "vocabulary" in manifest else []),
        "## Use",
        "",
        "```python",
        loading_code(manifest, name),
        "```",
        "",
        *([] if manifest["form"] == "stock" else [markdown(custom_note(manifest)), ""]),
        *_finetuned(manifest),
        "## How it was made",
        "",
        "```",
        slice_command(manifest),
        *finetune_commands(manifest),
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
        f"{markdown(section['trained'], starts=True)}, {section['steps']} steps "
        f"on {markdown(calibration_text(section['data']))}"
        + (f"; distilled from {markdown(Path(teacher).name)}" if teacher else "")
        + f". Perplexity on {measured['tokens']:,} held-out tokens: {change}.",
        "",
    ]
