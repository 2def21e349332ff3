"""What goes into a result's folder beside weights and config: tokenizer, generation config, modelling file."""

import json
import shutil
from pathlib import Path

from eigenslice.checkpoint.source import Source
from eigenslice.checkpoint.writer import write_json
from eigenslice.errors import CheckpointError
from eigenslice.modeling import MODELING_FILE


def write_tokenizer(source: Source, folder: Path) -> bool:
    """Copy the tokenizer and its chat template; a GGUF's is written by transformers. False if there is none."""
    if source.gguf:
        try:
            source.tokenizer.save_pretrained(folder)
        except CheckpointError:
            return False
    elif not source.tokenizer_files:
        return False
    for file in source.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    _fix_tokenizer_class(folder / "tokenizer_config.json")
    return True


def _fix_tokenizer_class(path: Path) -> None:
    """transformers 5 names its class TokenizersBackend, which 4.57 can't load; the older name works in both.

    4.57's class of that name also returns token_type_ids, which decoders refuse, unless told not to.
    """
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        for key in ("is_local", "local_files_only", "backend"):
            config.pop(key, None)
        write_json(path, config)


def write_generation_config(source: Source, folder: Path) -> None:
    """Copy the generation config; a GGUF's is written by transformers."""
    if source.gguf:
        config = source.generation_config
        if config is not None:
            config.save_pretrained(folder)
        return
    file = source.folder / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def write_modeling_file(folder: Path) -> None:
    """Copy the custom class's source, for `trust_remote_code=True` where eigenslice is not installed."""
    shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
