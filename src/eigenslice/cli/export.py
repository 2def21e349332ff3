"""`eigenslice export`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from eigenslice.cli.console import output, progress_bar
from eigenslice.cli.options import AsJson, Quiet, Revision, TrustCheckpoint


def export(
    model: Annotated[str, typer.Argument(help="A folder or a hub id, sliced or dense.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="File (gguf) or folder to write; must not exist.")],
    to: Annotated[
        Literal["gguf", "openvino", "onnx"], typer.Option(help="For llama.cpp; for OpenVINO; for ONNX Runtime.")
    ],
    revision: Revision = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Numbers to store. gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q6_k, q5_k, q4_k [f16]; the "
            "hidden width must divide by 32 (q8_0 to q4_0) or 256 (K-quants). openvino: f32, f16 [f32]. onnx: f32.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Run the result in its runtime and compare its log-probabilities with transformers'.")
    ] = True,
    tokenizer_pre: Annotated[
        str | None, typer.Option(help="llama.cpp's word for how the tokenizer splits text, where it isn't found.")
    ] = None,
    trust_remote_code: TrustCheckpoint = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for another runtime, and check there that it computes what transformers computes."""
    from eigenslice.checkpoint.hub import with_revision
    from eigenslice.export import export_model
    from eigenslice.options.export import ExportOptions

    options = ExportOptions(
        model=with_revision(model, revision),
        output=out,
        to=to,
        type=type_,
        check=check,
        tokenizer_pre=tokenizer_pre,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar(quiet) as progress:
        result = export_model(options, progress)
    if as_json:
        output.print_json(json.dumps(result.as_dict()))
        return
    formats = ", ".join(f"{number} {name}" for name, number in result.formats.items())
    lines = [f"{options.output}: {result.bytes / 1e6:.1f} MB, matrices: {formats}"]
    if result.agreement is not None:
        lines.append(f"{to} against transformers: {result.agreement.describe()} (allowed: mean {result.tolerance})")
    if result.unrounded is not None:
        lines.append(f"against the weights before rounding: {result.unrounded.describe()}")
    for line in lines:
        output.print(line, highlight=False, markup=False, soft_wrap=True)
