"""`eigenslice.json`: how a result was made, so that it explains itself."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from eigenslice._version import __version__
from eigenslice.algebra.basis import Spectrum
from eigenslice.data import Tokens
from eigenslice.errors import CheckpointError, OptionsError, first_line
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.forms import stock_type_of
from eigenslice.plan.layout import count, dense_roles, layout
from eigenslice.plan.plan import Plan
from eigenslice.report.manifest_fields import check
from eigenslice.runtime.reading import read_json
from eigenslice.runtime.run_file import differences

NAME = "eigenslice.json"
SAMPLED_VALUES = 48
ROW_BYTES = 16
"""Alignment in bytes of a matrix's rows that torch's grouped_mm requires."""


def site_summary(name: str, spectrum: Spectrum, width: int) -> dict[str, Any]:
    """A site's spectrum in short: the share of energy kept, and eigenvalues at some ranks.

    Args:
        name: Name of the site.
        spectrum: Principal components of the site.
        width: Number of components that are kept.
    """
    dense = len(spectrum.values)
    steps = [round(math.exp(i / (SAMPLED_VALUES - 1) * math.log(dense))) for i in range(SAMPLED_VALUES)]
    ranks = sorted({1, dense, min(width, dense), *steps})
    total = float(spectrum.values.sum()) or 1.0
    return {
        "site": name,
        "width": width,
        "energy_kept": spectrum.energy(width),
        "eigenvalues": {str(rank): float(spectrum.values[rank - 1]) / total for rank in ranks},
    }


def run_identity(options: SliceOptions, dense: DenseModel, tokens: Tokens) -> dict[str, Any]:
    """All that a result depends on: an interrupted run goes on only where none of it has changed."""
    free = {"output", "resume", "offload", "device"}
    return {
        "version": __version__,
        "versions": versions(),
        "option": {name: value for name, value in options.model_dump(mode="json").items() if name not in free},
        "input": dense.source.hashes,
        "calibration tokens": tokens.sha256,
    } | ({"vocabulary": dense.source.vocabulary["sha256"]} if dense.source.vocabulary else {})


def versions() -> dict[str, str]:
    """The versions of the libraries that compute."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def resumable(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that may not change before the run goes on.

    The stored dtype may: only the last pass depends on it, and a weight that doesn't fit a dtype is found there.
    """
    return identity | {"option": {name: value for name, value in identity["option"].items() if name != "dtype"}}


def finished_manifest(output: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a complete result.

    Raises:
        CheckpointError: it isn't a manifest of eigenslice.
        OptionsError: it was made from something else.
    """
    content = _read(output / NAME)
    different = sorted(differences(content.get("run"), json.loads(json.dumps(identity))))
    if different:
        raise OptionsError(
            f"{output} is complete, and was made with something else: " + "; ".join(different),
            allowed="--resume with the options, input and version that the run was begun with",
            next_step="choose another --output",
        )
    return content


def manifest(
    options: SliceOptions,
    dense: DenseModel,
    plan: Plan,
    tokens: Tokens,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the manifest's content, without the entries of the passes; every value is JSON."""
    anatomy = dense.anatomy
    roles = count(layout(anatomy, plan))
    stored = sum(roles.values())
    return {
        "eigenslice": __version__,
        "versions": versions(),
        "model_type": stock_type_of(plan.stock),
        "form": "stock" if plan.stock else "custom",
        "portable": plan.stock is not None and plan.stock.portable,
        "warning": _warning(anatomy, plan, dtype),
        "basis": plan.basis,
        "plan": plan.describe(),
        "dense_width": anatomy.width,
        "dense_neurons": anatomy.neuron_count,
        "dense_heads": anatomy.kv_head_count,
        "dense_experts": anatomy.expert_count,
        "dense_query_heads": anatomy.head_counts.queries if anatomy.head_counts else 0,
        "dense_blocks": anatomy.block_count,
        "site_widths": list(plan.site_widths),
        "tied": plan.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {
            "dense": anatomy.parameters,
            "stored": stored,
            "kept": stored / anatomy.parameters,
            "by_role": roles,
            "dense_by_role": dense_roles(anatomy),
        },
        "source": {
            "name": options.model,
            "revision": dense.source.revision,
            "model_type": anatomy.table.model_type,
            "sha256": dense.source.hashes,
        },
        "calibration": tokens.description,
        "options": options.model_dump(mode="json"),
    } | ({"vocabulary": dense.source.vocabulary} if dense.source.vocabulary else {})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None if there is none.

    Raises:
        CheckpointError: it isn't a manifest of eigenslice.
    """
    path = folder / NAME
    try:
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _read(path) if there else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        check(content)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return content


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no manifest of eigenslice ({first_line(error)})",
        allowed="the file that eigenslice slice or eigenslice finetune wrote",
        next_step="slice the model again, or copy its folder again",
    )


def _warning(anatomy: Anatomy, plan: Plan, dtype: torch.dtype) -> str:
    """Return a warning of known faults of other runtimes with a result; empty for none."""
    texts = [plan.stock.warning] if plan.stock and plan.stock.warning else []
    numbers = ROW_BYTES // dtype.itemsize
    sizes = (*plan.site_widths, *plan.neurons_per_block)
    if anatomy.table.mlp.stacked and any(size % numbers for size in sizes):
        texts.append(
            "grouped_mm, transformers' default for most types' experts, refuses widths and numbers of neurons in "
            f"{str(dtype).removeprefix('torch.')} that aren't multiples of {numbers}: load the result with "
            'experts_implementation="eager", or slice to other sizes'
        )
    return "; ".join(texts)
