"""What goes into a result's folder beside weights and config: tokenizer, generation config, modelling file."""

import json
import shutil
from pathlib import Path
from typing import Any

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
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if source.gguf else source.tokenizer_config
    if config is not None and config.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, _readable_by_transformers_4(config))
    return True


def _readable_by_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 names its class TokenizersBackend, which 4.57 can't load; the older name works in both.

    4.57's class of that name also returns token_type_ids, which decoders refuse, unless told not to.
    """
    changed = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "backend")}
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"model_input_names": ["input_ids", "attention_mask"]} | changed


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
