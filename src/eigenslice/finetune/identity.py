"""All that the result of a training depends on; see `runtime/run_file.py`."""

from importlib.metadata import version
from typing import Any

from eigenslice._version import __version__
from eigenslice.data import Tokens
from eigenslice.finetune.inputs import Input
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.report.manifest import versions
from eigenslice.runtime.ranks import Ranks


def run_identity(options: FinetuneOptions, inputs: list[Input], tokens: Tokens, ranks: Ranks) -> dict[str, Any]:
    """All that the result depends on: an interrupted run goes on only where none of it has changed."""
    free = {"output", "resume", "log_to", "trust_remote_code"}
    peft = {} if options.full else {"peft": version("peft")}
    return {
        "version": __version__,
        "versions": versions() | peft,
        "finetune": options.model_dump(mode="json", exclude=free),
        "input": inputs[0].hashes,
        "teacher": inputs[1].hashes if len(inputs) > 1 else None,
        "tokens": tokens.sha256,
        "processes": ranks.size,
    }


def resumable(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that may not change before the run goes on: only the last step cuts files."""
    return identity | {"finetune": {k: v for k, v in identity["finetune"].items() if k != "shard_gib"}}
