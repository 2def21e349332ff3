"""`eigenslice slice`."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from eigenslice.cli.console import errors, output, progress_bar
from eigenslice.cli.options import Device, Quiet, Revision, TrustTokenizer


def slice_(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    revision: Revision = None,
    keep: Annotated[float | None, typer.Option(help="Share of the stored parameters to keep, such as 0.75.")] = None,
    slicing: Annotated[
        float | None, typer.Option(help="The paper's measure: share of the hidden width to cut.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Hidden width to keep.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Plan from a file: an eigenslice.json, or YAML with width and neurons.")
    ] = None,
    neurons: Annotated[
        int | None,
        typer.Option(help="MLP neurons (of each expert) to keep in every block, with --width or --slicing [all]."),
    ] = None,
    mlp: Annotated[bool, typer.Option(help="With --keep: cut MLP neurons, too; --no-mlp cuts the width only.")] = True,
    heads: Annotated[
        bool, typer.Option(help="With --keep: cut key/value heads, each with its query heads, too.")
    ] = True,
    depth: Annotated[bool, typer.Option(help="With --keep: leave out whole blocks, too, where all are alike.")] = True,
    basis: Annotated[
        Literal["global", "per-block"],
        typer.Option(help="One basis for all sites, or one each with shortcuts (the paper)."),
    ] = "global",
    refit: Annotated[
        bool | None,
        typer.Option(help="Fit sliced weights to the dense model's activations [yes with a global basis]."),
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Store embedding and head separately.")] = False,
    form: Annotated[
        Literal["auto", "stock", "custom"],
        typer.Option(help="Save as a stock config of transformers, or as eigenslice's class."),
    ] = "auto",
    multiple: Annotated[
        int, typer.Option(help="--slicing and --keep choose multiples of this: 8, or 32 (Q8_0) or 256 (K-quants).")
    ] = 8,
    portable: Annotated[
        bool, typer.Option("--portable", help="Only what llama.cpp and vLLM are known to run, or an error.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to find the basis on: mixed (wikitext2, fineweb-edu, tinystories, alpaca and code), one of "
            "these, c4, ptb, builtin, a file (text, .json, .jsonl, .csv, .parquet, also packed; .safetensors with "
            "token ids), or a hub data set NAME[:CONFIG[:SPLIT]] [mixed]. Conversations are in the model's chat "
            "template. Several: equal shares of each."
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="Text field of records (several: a,b) [text, or else a conversation], or tensor of a .safetensors; "
            "once, or once for each text."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences, of all texts together.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 2048,
    own_text: Annotated[
        float | None,
        typer.Option(
            help="Sequences of text that the model writes itself, as a share of those of the texts [0.5, if the whole "
            "model takes less memory than slicing]."
        ),
    ] = None,
    random_tokens: Annotated[
        float | None,
        typer.Option(help="Sequences of random tokens to fit on, as such a share [0.25 without text of its own]."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Stored dtype [as the source].")
    ] = None,
    compute_dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Dtype of the forward pass [float32 on CPU, the source's on a GPU]."),
    ] = None,
    device: Device = None,
    offload: Annotated[
        Literal["auto", "none", "disk"],
        typer.Option(help="Where calibration activations live: none is on the device, auto where they fit."),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    shard_size: Annotated[float, typer.Option(help="Size of an output file in GiB.")] = 5.0,
    trust_remote_code: TrustTokenizer = False,
    log_dir: Annotated[Path | None, typer.Option(help="Log speed and memory there for TensorBoard, too.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to this repository of the hub, OWNER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest, and lines of progress, as JSON.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Slice a model into a new folder, of exactly one size: --keep, --slicing, --width or --recipe."""
    from eigenslice.checkpoint.hub import check_hub, push, with_revision
    from eigenslice.options.calibration import CalibrationOptions
    from eigenslice.options.paths import expanded
    from eigenslice.options.slicing import SliceOptions
    from eigenslice.runtime.output import partial_path
    from eigenslice.slicing import slice_model

    options = SliceOptions(
        model=with_revision(model, revision),
        output=out,
        keep=keep,
        slicing=slicing,
        width=width,
        recipe=recipe,
        neurons=neurons,
        mlp=mlp,
        heads=heads,
        depth=depth,
        basis=basis,
        refit=refit,
        own_text=own_text,
        random_tokens=random_tokens,
        untie=untie,
        form=form,
        multiple=multiple,
        portable=portable,
        calibration=CalibrationOptions(
            data=tuple(calibration or ["mixed"]),
            field=tuple(field or ()),
            samples=samples,
            seqlen=seqlen,
            seed=seed,
        ),
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        offload=offload,
        resume=resume,
        shard_gib=shard_size,
        trust_remote_code=trust_remote_code,
    )

    def left() -> str:
        partial = partial_path(options.output)
        if not partial.exists():
            return "nothing was written"
        return f"run the same command with --resume to go on, or remove {partial}"

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
        return
    if quiet:
        return
    sizes, manifest = result.manifest["parameters"], result.manifest
    output.print(
        f"{options.output}: {sizes['dense'] / 1e6:.1f} M -> {sizes['stored'] / 1e6:.1f} M parameters "
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
        errors.print(
            f"{manifest['warning']}.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
