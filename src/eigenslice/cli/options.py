"""Options of the command line alone, which no model in `options/` has; each is written once."""

from pathlib import Path
from typing import Annotated

from eigenslice.options.flags import MACHINE, OUTPUT, TRAINING, Option

Compared = Annotated[
    list[str], Option("Folders, hub ids or .gguf files, dense or sliced; compared with the first.", argument=True)
]
Revision = Annotated[
    str | None,
    Option("Branch, tag or commit of the model on the hub; MODEL@REVISION says the same.", MACHINE, "main"),
]
RecipeName = Annotated[
    str | None, Option("paper: Alpaca, LoRA r=32 alpha=10 dropout 0.05, 1024 tokens.", TRAINING, "no recipe")
]
AsJson = Annotated[bool, Option("Print JSON.", OUTPUT, flags=("--json",))]
ManifestAsJson = Annotated[bool, Option("Print the manifest as JSON.", OUTPUT, flags=("--json",))]
ProgressAsJson = Annotated[
    bool, Option("Print the manifest, and lines of progress, as JSON.", OUTPUT, flags=("--json",))
]
Quiet = Annotated[
    bool, Option("No progress; slice, finetune and report then print nothing.", OUTPUT, flags=("--quiet", "-q"))
]
LogDir = Annotated[Path | None, Option("Log speed and memory there for TensorBoard, too.", OUTPUT, "no logs")]
PushToHub = Annotated[
    str | None, Option("Upload the result to this repository of the hub, OWNER/NAME.", OUTPUT, "no upload")
]
Private = Annotated[bool, Option("Make the repository of --push-to-hub private.", OUTPUT)]
