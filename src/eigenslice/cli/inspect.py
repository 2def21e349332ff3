"""`eigenslice inspect`."""

import json
from typing import Any

from rich.table import Table

from eigenslice.cli.commands import Given
from eigenslice.cli.console import errors, output, progress_bar
from eigenslice.cli.options import AsJson, Revision
from eigenslice.options.inspection import InspectOptions


def inspect(given: Given[InspectOptions], revision: Revision = None, as_json: AsJson = False) -> None:
    """Show whether a model can be sliced, its parameters by role, and the size of each result."""
    from eigenslice.inspection.estimate import HEALED_TOKENS
    from eigenslice.inspection.inspect import inspect_model

    options = given.options(revision)
    samples, seqlen = options.calibration.samples, options.calibration.seqlen
    with progress_bar(quiet=True):
        result = inspect_model(options.model, options.trust_remote_code, samples, seqlen, options.device)
    if as_json:
        output.print_json(json.dumps(result.as_dict()))
        return
    tied = "tied" if result.tied else "separate"
    output.print(
        f"{options.model}: supported ({result.model_type}); {result.blocks} blocks, {result.sites} sites of width "
        f"{result.width}, embedding and head {tied}, {result.dtype}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    roles = Table("role", "parameters", "share")
    for role, size in result.by_role.items():
        roles.add_row(role, f"{size:,}", f"{100 * size / result.parameters:.1f} %")
    roles.add_row("total", f"{result.parameters:,}", "100.0 %")
    output.print(roles)
    output.print(
        f"The vocabulary's {result.tokens:,} tokens take {100 * result.vocabulary_share:.1f} % of the parameters: "
        "--vocabulary-from keeps those that texts need.",
        highlight=False,
        soft_wrap=True,
    )
    sizes = Table("slicing", "width", "basis", "head", "saved as", "parameters", "kept")
    for row in result.sizes:
        head = "tied" if row.tied else "separate"
        sizes.add_row(
            f"{100 * row.slicing:.0f} %",
            str(row.width),
            row.basis,
            head,
            row.saved_as,
            f"{row.parameters:,}",
            f"{100 * row.kept:.1f} %",
        )
    output.print(sizes)
    guess = result.estimate
    healing = guess.healing_memory
    output.print(
        f"Slicing with {guess.tokens:,} calibration tokens (--samples {samples} --seqlen {seqlen}) takes about "
        f"{_duration(guess.seconds)} and {_memory(guess.memory)} here without refit, "
        f"{_duration(guess.refitted_seconds)} and {_memory(guess.refitted_memory)} with --keep and refit ("
        + ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in _parts(guess).items())
        + ").",
        highlight=False,
        soft_wrap=True,
    )
    output.print(
        f"Healing (--heal) takes {_duration(guess.healing_seconds)} more for each {HEALED_TOKENS:,} tokens, and "
        f"{healing.whole / 1e9:.1f} GB on one device. torchrun --nproc-per-node N shares the weights among N: "
        + ", ".join(f"{size / 1e9:.1f} GB on each of {n}" for n, size in healing.shared.items())
        + f". LoRA adapters (finetune --no-full) take {healing.adapters / 1e9:.1f} GB on one device"
        + (f", and with the other weights on the host {_memory(healing.on_host)}" if healing.on_host.device else "")
        + ".",
        highlight=False,
        soft_wrap=True,
    )
    for line in guess.advice:
        errors.print(f"It doesn't fit: {line}.", style="yellow", highlight=False, soft_wrap=True)


def _parts(guess: Any) -> dict[str, float]:
    """Return the parts of the time with --keep and refit that take a second or more, by the stage of the run."""
    parts = guess.stage_seconds | {"bus": guess.bus_seconds}
    return {stage: seconds for stage, seconds in parts.items() if seconds >= 1}


def _memory(need: Any) -> str:
    """Return host memory, and the device's where there is one."""
    host = f"{need.host / 1e9:.1f} GB of memory"
    return f"{need.device / 1e9:.1f} GB on the device and {host}" if need.device else host


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
