"""The measured loss of a result in words, and what to do about a large one."""

import math
from typing import Any

from eigenslice.algebra.finite import LARGEST_EXPONENT

BOUND = 2.0
"""Perplexity ratio from which on a result is called much worse than the dense model."""


def loss_text(manifest: dict[str, Any]) -> str:
    """Return the loss of a result in one line."""
    loss = manifest.get("loss") or {}
    if "kl" not in loss:
        return f"loss not measured: {why_not_measured(manifest)}"
    before = ", before fine-tuning" if is_older_than_training(manifest) else ""
    return (
        f"estimated loss{before}: perplexity x{loss['perplexity_ratio']:.3f} ({perplexities(loss)}) and "
        f"{kl_text(loss)}, on {loss['tokens']:,} held-out tokens of the calibration text"
    )


def is_older_than_training(manifest: dict[str, Any]) -> bool:
    """Return whether the loss in a manifest was measured before the model was trained."""
    return "finetune" in manifest and not (manifest.get("loss") or {}).get("finetuned")


def healing_text(section: dict[str, Any]) -> str:
    """Return the effect of a training beside a teacher in one line, from the manifest's section on it."""
    texts = section["texts"]
    before, after = (sum(text[when] for text in texts) / len(texts) for when in ("before", "after"))
    if not section["best_step"]:
        return f"healing: no gain in {section['steps']} steps on {section['trained']}; the weights are those of slicing"
    return (
        f"healing: KL {before:.3f} -> {after:.3f} nats per token, mean over held-out windows of {len(texts)} kinds of "
        f"text; {section['trained']}, step {section['best_step']} of {section['steps']}"
    )


def why_not_measured(manifest: dict[str, Any]) -> str:
    """Return why a manifest has no loss."""
    return (manifest.get("loss") or {}).get("not_measured") or "the manifest is of an older version"


def perplexities(loss: dict[str, Any]) -> str:
    """Return both perplexities."""
    return f"{loss['dense_perplexity']:.4g} -> {loss['sliced_perplexity']:.4g}"


def kl_text(loss: dict[str, Any]) -> str:
    """Return the KL divergence with its unit."""
    return f"KL {loss['kl']:.3f} nats per token"


def loss_warning(manifest: dict[str, Any]) -> str:
    """Return what is wrong with a result that loses much, and what to do; empty if the loss is small or not known.

    On text as the dense model would write it, exp(KL) is the perplexity ratio. Either ratio over `BOUND` counts.
    """
    loss = manifest.get("loss") or {}
    if "kl" not in loss or max(loss["perplexity_ratio"], _ratio_on_own_text(loss)) <= BOUND:
        return ""
    return (
        f"This result is much worse than the dense model ({kl_text(loss)}; perplexity "
        f"x{loss['perplexity_ratio']:.3f} on held-out calibration text). What may help: {'; '.join(_advice(manifest))}."
    )


def _ratio_on_own_text(loss: dict[str, Any]) -> float:
    return math.exp(min(loss["kl"], LARGEST_EXPONENT))


def _advice(manifest: dict[str, Any]) -> list[str]:
    """Return steps that lose less, the most helpful step first."""
    options, calibration = manifest["options"], manifest["calibration"]
    steps = [f"keep more of the model (this result has {100 * manifest['parameters']['kept']:.1f} % of it)"]
    if manifest["basis"] == "per-block":
        steps.append("--basis global, which fits the weights")
    elif options.get("refit") is False:
        steps.append("leave out --no-refit, so that the weights are fitted")
    if manifest["basis"] == "global" and not options.get("portable"):
        steps.append(f"another form (--form {'custom' if manifest['form'] == 'stock' else 'stock'})")
    steps.append("more calibration text (--samples), or text nearer to what the model is for (--calibration)")
    is_text = "seed" in calibration
    if is_text and manifest.get("refitted") and not calibration.get("own_sequences"):
        steps.append("text that the model writes itself (--own-text 0.5)")
    return steps if manifest.get("finetune") else [*steps, "training afterwards (--heal, or eigenslice finetune)"]
