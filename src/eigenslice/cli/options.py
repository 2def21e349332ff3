"""Options that several verbs have, declared once."""

from typing import Annotated, Literal

import typer

Device = Annotated[str | None, typer.Option(help="torch device [a GPU if there is one].")]
RunDtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Dtype to run in [float32 on CPU, the stored one on a GPU]."),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the model on the hub; MODEL@REVISION says the same [main]."),
]
TrustCheckpoint = Annotated[bool, typer.Option("--trust-remote-code", help="Let the checkpoint run its own code.")]
TrustCheckpoints = Annotated[bool, typer.Option("--trust-remote-code", help="Let the checkpoints run their own code.")]
TrustTokenizer = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the tokenizer run the checkpoint's code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
