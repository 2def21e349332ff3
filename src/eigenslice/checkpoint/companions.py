"""Files of a result's folder beside weights and config: tokenizer, generation config, licences, code.

All companions are written into a folder before the first pass. So nothing is refused when the work is done.
"""

import shutil
from pathlib import Path
from typing import Any

from eigenslice.checkpoint import names
from eigenslice.checkpoint.files import LARGEST_VOCABULARY, check_file, read_json
from eigenslice.checkpoint.source import Source, load_tokenizer
from eigenslice.checkpoint.writer import write_json
from eigenslice.errors import CheckpointError
from eigenslice.modeling import MODELING_FILE

CONFIGS = (names.TOKENIZER_CONFIG, *names.PROCESSOR_FILES)
"""Files that may name code."""


def stage_companions(source: Source, folder: Path) -> None:
    """Write all that a result takes over from its source beside the weights; a GGUF's is written by transformers.

    Args:
        source: The dense checkpoint.
        folder: A folder of this run's own; made if it isn't there.

    Raises:
        CheckpointError: a file is broken or leads elsewhere, or the tokenizer needs code that isn't trusted.
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generation = source.generation_config  # a broken one is refused here
    if source.gguf:
        _write_tokenizer_of_gguf(source, folder)
        if generation is not None:
            generation.save_pretrained(folder)
    else:
        copy_companions(source.name, source.folder, folder, source.trust_remote_code)


def copy_companions(name: str, source: Path, folder: Path, trust_remote_code: bool, result: bool = False) -> None:
    """Copy the files that `companions_of` names into `folder`; the other arguments are the same.

    Raises:
        CheckpointError: as `companions_of`; or a file leads out of the source's folder or is no regular file.
    """
    for file in companions_of(name, source, trust_remote_code, result):
        if file == MODELING_FILE.name and not (source / file).exists():  # a result that lost it
            write_modeling_file(folder)
            continue
        _copy(source, folder, file)
        if file in CONFIGS:
            config = read_json(source / file, source, "a JSON object")
            changed = _as_written(config, file, trust_remote_code)
            if changed != config:
                write_json(folder / file, changed)


def companions_of(name: str, source: Path, trust_remote_code: bool, result: bool = False) -> list[str]:
    """Return names of the files of tokenizer and processor, generation config, licences, and the code that these files
    name.

    Args:
        name: The checkpoint, as the user wrote it.
        source: Its folder.
        trust_remote_code: True if code may be among the files. Otherwise no code is copied and no config names code.
        result: True if the copy is of the same model: then the model's own code is copied, too.

    Raises:
        CheckpointError: a config is broken, or the tokenizer needs code that isn't there or isn't trusted.
    """
    present = _present(source)
    companions = {file for file in present if names.is_companion(file)}
    if names.CARD in present:
        check_file(source / names.CARD, source, LARGEST_VOCABULARY)
        companions |= {link for link in names.linked_licence(source) if (source / link).exists()}
    configs = [read_json(source / file, source, "a JSON object") for file in CONFIGS if file in present]
    code = set[str]().union(*map(names.code_named, configs))
    if code and not trust_remote_code:
        load_tokenizer(name, source, None, trust_remote_code=False)  # it works without, or the error names the option
    elif code:
        companions |= _with_named(source, code, present)
    if result:
        config = read_json(source / names.CONFIG, source, "a config.json as transformers saves it")
        own = names.code_named(config)
        companions |= _with_named(source, own - {MODELING_FILE.name}, present) | own & {MODELING_FILE.name}
    return sorted(companions)


def _present(source: Path) -> set[str]:
    """Return names of a checkpoint's files and chat templates, links that lead nowhere included."""
    files = {path.name for path in source.iterdir() if not path.is_dir()}
    templates = source / names.TEMPLATES
    if templates.is_dir():
        files |= {f"{names.TEMPLATES}/{path.name}" for path in templates.iterdir() if not path.is_dir()}
    return files


def _with_named(source: Path, code: set[str], present: set[str]) -> set[str]:
    """Code, with the files that it imports or names.

    Raises:
        CheckpointError: some of it isn't there.
    """
    missing = sorted(code - present)
    if missing:
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}, which its configs name as code",
            allowed="a checkpoint with the code that it needs",
            next_step="download the missing files, or remove auto_map from the config that names them",
        )
    reached: set[str] = set()
    while code - reached:
        new = code - reached
        reached |= new
        for file in new:
            if file.endswith(".py"):
                check_file(source / file, source, LARGEST_VOCABULARY)
                code = code | names.named_by_code(source / file, present)
    return reached


def _copy(source: Path, folder: Path, file: str) -> None:
    check_file(source / file, source, LARGEST_VOCABULARY)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / file, folder / file)


def _as_written(config: dict[str, Any], file: str, trust_remote_code: bool) -> dict[str, Any]:
    """A config as the result has it: without code that isn't copied, and readable by transformers 4."""
    if not trust_remote_code and names.code_named(config):
        config = names.without_code(config)
    if file == names.TOKENIZER_CONFIG and config.get("tokenizer_class") == "TokenizersBackend":
        return _readable_by_transformers_4(config)
    return config


def _readable_by_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 names its class TokenizersBackend, which 4.57 can't load; the older name works in both.

    4.57's class of that name also returns token_type_ids, which decoders refuse, unless told not to.
    """
    changed = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "backend")}
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"model_input_names": ["input_ids", "attention_mask"]} | changed


def _write_tokenizer_of_gguf(source: Source, folder: Path) -> None:
    try:
        tokenizer = source.tokenizer
    except CheckpointError:  # who has texts to read meets this error; token ids need no tokenizer
        return
    tokenizer.save_pretrained(folder)
    path = folder / names.TOKENIZER_CONFIG
    config = read_json(path, folder, "a JSON object")
    write_json(path, _as_written(config, path.name, trust_remote_code=True))


def write_modeling_file(folder: Path) -> None:
    """Copy the custom class's source, for `trust_remote_code=True` where eigenslice is not installed."""
    shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
