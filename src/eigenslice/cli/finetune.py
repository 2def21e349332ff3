"""`eigenslice finetune`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from eigenslice.cli.console import errors, output, progress_bar
from eigenslice.cli.options import Quiet, Revision, TrustCheckpoints


def finetune(
    model: Annotated[str, typer.Argument(help="A folder that eigenslice wrote.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    revision: Revision = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model, to distil from (recovers most).")] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the distillation in the loss; the rest is the next token's [0.8].")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="paper: Alpaca, LoRA r=32 alpha=10 dropout 0.05, 1024 tokens.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of LoRA adapters.")] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters [32].")] = None,
    alpha: Annotated[float | None, typer.Option(help="Their scale times their rank [32].")] = None,
    dropout: Annotated[float | None, typer.Option(help="Their dropout [0].")] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Store the adapter beside the weights instead of merging it.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option("--calibration", "--data", help="Text to train on, as slice's --calibration [mixed]."),
    ] = None,
    field: Annotated[list[str] | None, typer.Option(help="Text field of records, as slice's --field.")] = None,
    samples: Annotated[int | None, typer.Option(help="Windows to train on [400].")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window [1024].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling, adapters and order [0].")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Write records with instructions and answers in the model's chat template [if it has one]."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the windows [1].")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step, over all devices [4].")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows at once on one device [1].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate [1e-3; 3e-4 with --full].")] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"] | None, typer.Option(help="Its course [cosine].")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which it rises [0.05].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's [0].")] = None,
    held_out: Annotated[int | None, typer.Option(help="Windows to measure instead of training on them [16].")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between measurements and checkpoints [a tenth of the run].")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many measurements without a gain [train to the end].")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Dtype to compute in [float32 on CPU, bfloat16 on a GPU that has it]."),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="[a GPU if there is one].")] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory, a third more time.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    log_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard (into OUTPUT.logs), trackio; may be repeated.")
    ] = None,
    shard_size: Annotated[float | None, typer.Option(help="Size of an output file in GiB [5].")] = None,
    trust_remote_code: TrustCheckpoints = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to this repository of the hub, OWNER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a sliced model for a while, so that it recovers; the result is stored as before."""
    from eigenslice.checkpoint.hub import check_hub, push, with_revision
    from eigenslice.finetune import finetune as run
    from eigenslice.finetune import with_recipe
    from eigenslice.runtime.output import partial_path

    given: dict[str, Any] = {
        "model": with_revision(model, revision),
        "output": out,
        "teacher": teacher,
        "distill": distill,
        "full": full,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "keep_adapter": keep_adapter,
        "chat": chat,
        "epochs": epochs,
        "batch": batch,
        "micro_batch": micro_batch,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "held_out": held_out,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "dtype": dtype,
        "device": device,
        "checkpoint_activations": checkpoint_activations,
        "resume": resume,
        "log_to": tuple(log_to) if log_to else None,
        "shard_gib": shard_size,
        "trust_remote_code": trust_remote_code,
    }
    data = {
        "data": tuple(calibration) if calibration else None,
        "field": tuple(field) if field else None,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
    }
    options = with_recipe(recipe, _chosen(given), _chosen(data))
    others = os.environ.get("RANK", "0") != "0"  # of several processes, one speaks
    if push_to_hub and not others:
        check_hub(push_to_hub)

    def left() -> str:
        partial = partial_path(options.output)
        if not partial.exists():
            return "nothing was written"
        return f"run the same command with --resume to go on, or remove {partial}"

    with progress_bar(quiet or others, interrupted=left) as progress:
        result = run(options, progress)
    if others:
        return
    if push_to_hub:
        errors.print(push(options.output, push_to_hub, private), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        output.print_json(json.dumps(result.manifest))
    elif not quiet:
        section = result.manifest["finetune"]
        output.print(
            f"{options.output}: perplexity {result.before.perplexity:.4f} -> {result.after.perplexity:.4f} on "
            f"{result.after.tokens} held-out tokens, {section['steps']} steps, {section['trained']}",
            highlight=False,
            soft_wrap=True,
        )


def _chosen(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
