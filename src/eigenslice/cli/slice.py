"""`eigenslice slice`."""

import json
import os
from pathlib import Path
from typing import Any

from eigenslice.cli.commands import Given
from eigenslice.cli.console import errors, output, progress_bar
from eigenslice.cli.options import LogDir, Private, ProgressAsJson, PushToHub, Quiet, Revision
from eigenslice.options.slicing import SliceOptions


def slice_(
    given: Given[SliceOptions],
    revision: Revision = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    log_dir: LogDir = None,
    as_json: ProgressAsJson = False,
    quiet: Quiet = False,
) -> None:
    """Slice a model into a new folder, of exactly one size: --keep, --slicing, --width or --recipe.

    --keep tries several splits of the cut on held-out calibration tokens, and takes the best one.
    """
    from eigenslice.checkpoint.hub import check_hub, push
    from eigenslice.healing import slice_model
    from eigenslice.options.paths import expanded
    from eigenslice.runtime.output import partial_path, unhealed_path

    options = given.options(revision)

    def left() -> str:
        unhealed = unhealed_path(options.output)
        folders = (partial_path(options.output), partial_path(unhealed), unhealed)
        there = [str(folder) for folder in folders if folder.exists()]
        if not there:
            return "nothing was written"
        return f"run the same command with --resume to go on, or remove {' and '.join(there)}"

    if push_to_hub:
        check_hub(push_to_hub)
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    with progress_bar(quiet or not first, as_json, expanded(log_dir) if first and log_dir else None, left) as progress:
        result = slice_model(options, progress)
    if not first:
        return
    if push_to_hub:
        errors.print(push(options.output, push_to_hub, private), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        output.print_json(json.dumps(result.manifest))
    elif not quiet:
        _show(options.output, result.manifest)


def _show(folder: Path, manifest: dict[str, Any]) -> None:
    """Print the size, the form and the loss of a result; warnings go to standard error."""
    from eigenslice.report.stated_loss import healing_text, loss_text, loss_warning

    sizes = manifest["parameters"]
    output.print(
        f"{folder}: {sizes['dense'] / 1e6:.1f} M -> {sizes['stored'] / 1e6:.1f} M parameters "
        f"({100 * sizes['kept']:.1f} %), width {manifest['dense_width']} -> {manifest['site_widths'][0]}, "
        f"saved as {manifest['model_type']} ({manifest['form']})",
        highlight=False,
        soft_wrap=True,
    )
    if manifest["form"] == "custom":
        errors.print(
            "It loads by AutoModelForCausalLM after `import eigenslice`, or with trust_remote_code=True.",
            highlight=False,
            soft_wrap=True,
        )
    if manifest.get("warning"):
        errors.print(f"{manifest['warning']}.", style="yellow", highlight=False, soft_wrap=True)
    if loss_warning(manifest):
        errors.print(loss_warning(manifest), style="yellow", highlight=False, soft_wrap=True)
    if "finetune" in manifest:
        output.print(healing_text(manifest["finetune"]), highlight=False, soft_wrap=True)
    output.print(loss_text(manifest), highlight=False, soft_wrap=True)
