"""Names of the files that belong to a checkpoint: files to download, and files of a result."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from eigenslice.checkpoint.card_metadata import read_card_metadata
from eigenslice.errors import CheckpointError

CONFIG, GENERATION, CARD, MANIFEST = "config.json", "generation_config.json", "README.md", "eigenslice.json"
TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "byte_maps.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "word_pronunciation.json",
    "word_shape.json",
    "tiktoken.model",
    "tekken.json",
)
"""Vocabulary files of every tokenizer class of transformers (`vocab_files_names`), and of mistral-common."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_PATTERNS = (
    "tokenizer.*.json",  # one for each version of transformers
    "tokenizer.model.*",  # Mistral's
    "*.model",
    "*.spm",
    "*.tiktoken",
    f"{TEMPLATES}/*.jinja",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""A result reads text alone, but programs written for the source load its processor, and write text through it."""
LICENCE = re.compile(r"((un)?licen[cs]e|notice|copying|copyright|use_policy)([-_. ][^/]*)?", re.IGNORECASE)
TEXTS = {"", ".txt", ".md", ".rst", ".html", ".pdf"}
"""Suffixes of licence files that a card may link to."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt"}
OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MODULE = re.compile(r"([A-Za-z_]\w*)\.\w+")
QUOTED = re.compile(r"""["']([\w.-]+)["']""")


def is_of_tokenizer(name: str) -> bool:
    """Return whether a file, by its path in the checkpoint, is a tokenizer's or a chat template."""
    if name in TOKENIZER_FILES:
        return True
    depth = name.count("/")
    return any(fnmatchcase(name, pattern) and depth == pattern.count("/") for pattern in TOKENIZER_PATTERNS)


def is_licence(name: str) -> bool:
    """Return whether a file holds a licence, or a notice that a licence asks to be kept."""
    return bool(LICENCE.fullmatch(name)) and not is_weights(name) and not name.endswith(".py")


def is_companion(name: str) -> bool:
    """Return whether a file goes into a result beside config and weights: tokenizer, processor or licence."""
    return is_of_tokenizer(name) or name in PROCESSOR_FILES or name == GENERATION or is_licence(name)


def linked_licence(folder: Path) -> set[str]:
    """The file that a card's metadata links to as the licence, if the link is a path in the card's folder."""
    link = read_card_metadata(folder / CARD, warn=False).get("license_link")
    path = PurePosixPath(link) if isinstance(link, str) and ":" not in link else None
    if path is None or not path.name or path.is_absolute() or ".." in path.parts or str(path) == CARD:
        return set()
    return {str(path)} if path.suffix.lower() in TEXTS else set()


def code_named(config: dict[str, Any]) -> set[str]:
    """The Python files beside a config that its `auto_map` names."""
    entries = config.get("auto_map") or ()
    values = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    modules = (MODULE.fullmatch(value) for value in flat if isinstance(value, str))
    return {f"{module[1]}.py" for module in modules if module}


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config that names no Python files."""
    return {key: value for key, value in config.items() if key != "auto_map"}


def named_by_code(code: Path, names: Iterable[str]) -> set[str]:
    """Files beside a Python file that it imports, or that stand in it as a text, such as a vocabulary's name."""
    from transformers.dynamic_module_utils import get_relative_imports

    try:
        imported = {f"{module}.py" for module in get_relative_imports(code)}
        quoted = set(QUOTED.findall(code.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{code} can't be read ({type(error).__name__}: {error})",
            allowed="Python files in UTF-8",
            next_step="download or save the checkpoint again",
        ) from error
    data = {name for name in quoted if not is_weights(name) and not name.endswith(".py")}
    return (imported | data - {CONFIG, MANIFEST, CARD}) & set(names)


def is_weights(name: str) -> bool:
    """Return whether a file holds weights, in any format."""
    return bool(WEIGHTS & {suffix.lower() for suffix in PurePosixPath(name).suffixes})


def only_gguf(name: str, names: Iterable[str]) -> str | None:
    """The GGUF file of a folder or repository that holds no other weights; None if there are others, or no GGUF file.

    Args:
        name: The folder or repository, for the message.
        names: Its files.

    Raises:
        CheckpointError: there are several GGUF files.
    """
    names = set(names)
    others = {"model.safetensors", "model.safetensors.index.json", *OTHER_WEIGHTS}
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf") and not PurePosixPath(n).name.startswith("mmproj"))
    if not ggufs or others & names:
        return None
    if len(ggufs) > 1:
        listed = ", ".join(ggufs[:6]) + (", ..." if len(ggufs) > 6 else "")
        place, at, revision = name.partition("@")
        raise CheckpointError(
            f"{name} holds {len(ggufs)} GGUF files: {listed}",
            allowed="a folder or repository with one model, or the name of one of its files",
            next_step=f"name one of them: {place.rstrip('/')}/{ggufs[0]}{at}{revision}",
        )
    return ggufs[0]
