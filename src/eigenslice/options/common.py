"""Options that several verbs have, and their types and ranges."""

from typing import Annotated, Literal

from eigenslice.options.flags import MACHINE, RESULT, Option, Range

LONGEST = 10**8
"""Tokens in a sequence; no model and no text has more."""
SEED = Range(0, 2**63 - 1, "0 to 2^63 - 1")
DtypeName = Literal["float32", "float16", "bfloat16"]
GPU = "a GPU if there is one"

Device = Annotated[str | None, Option("torch device.", MACHINE, GPU)]
RunDtype = Annotated[
    DtypeName | None, Option("Dtype to run in.", MACHINE, "float32 on CPU; the stored one on a GPU, bfloat16 of a GGUF")
]
ShardGib = Annotated[
    float,
    Option("Size of an output file in GiB.", RESULT, flags=("--shard-size",)),
    Range(1e-6, 1e6, "0.000001 to 1000000 (GiB)"),
]
TrustCheckpoint = Annotated[bool, Option("Let the checkpoint run its own code.", MACHINE)]
TrustCheckpoints = Annotated[bool, Option("Let the checkpoints run their own code.", MACHINE)]
TrustTokenizer = Annotated[bool, Option("Let the tokenizer run the checkpoint's code.", MACHINE)]
