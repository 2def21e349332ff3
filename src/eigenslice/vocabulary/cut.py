"""From what the user asked for to a checkpoint with fewer tokens."""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from eigenslice.arch import lookup
from eigenslice.checkpoint.companions import stage_companions
from eigenslice.checkpoint.empty import empty_model
from eigenslice.checkpoint.files import LARGEST_VOCABULARY, read_json
from eigenslice.checkpoint.mapping import origins
from eigenslice.checkpoint.names import CONFIG, GENERATION, TOKENIZER_CONFIG, is_of_tokenizer
from eigenslice.checkpoint.source import Source, load_tokenizer
from eigenslice.checkpoint.writer import write_json
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.vocabulary.choice import choose_tokens
from eigenslice.vocabulary.kept_source import PIECE, KeptTokens, SourceOfKeptTokens
from eigenslice.vocabulary.likeness import likeness
from eigenslice.vocabulary.rewriting import (
    ids_of_steps,
    named_ids,
    renumber,
    renumbering,
    rewrite_tokenizer,
    rewrite_tokenizer_config,
)
from eigenslice.vocabulary.specification import Specification, read_specification, refused
from eigenslice.vocabulary.token_counts import Reading, count_tokens, first_difference, measure_length, read_texts

TOKENIZER = "tokenizer.json"
KEPT_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
"""Files of a tokenizer that a result has; chat templates in a folder of their own stay, too. All others hold the
vocabulary again (tokenizer.model, vocab.json, merges.txt, ...) and would contradict tokenizer.json."""
STREAMED = 10**7
"""Characters of a large data set on the hub that are read to choose tokens."""
MEASURED = 10**6
"""Characters of each text on which the number of tokens is compared."""


def cut_vocabulary(source: Source, options: SliceOptions, folder: Path) -> Source:
    """Leave out the tokens that aren't needed, if the user asked for that.

    Args:
        source: The dense checkpoint.
        options: --vocabulary, --vocabulary-from and the calibration texts.
        folder: An empty folder for the rewritten files, which has to outlive the result.

    Returns:
        The checkpoint with the kept tokens; the same source where all tokens stay.

    Raises:
        UnsupportedModelError: a tokenizer whose vocabulary can't be cut.
        OptionsError: a number of tokens that can't be kept.
        CalibrationError: texts that can't be read.
    """
    if not options.cuts_vocabulary:
        return source
    specification = _specification(source, folder)
    texts = CalibrationOptions(data=options.vocabulary_from) if options.vocabulary_from else options.calibration
    readings = read_texts(texts, source.tokenizer, STREAMED, warn=bool(options.vocabulary_from))
    counts = count_tokens(source.tokenizer, readings)
    alike = likeness(_embedding(source), counts).tolist() if options.vocabulary is not None else ()
    kept = choose_tokens(specification, counts, _named(source, specification, folder), options.vocabulary, alike)
    ids = renumbering(kept)
    rows = int(source.config.vocab_size)
    _rewrite(folder, specification, ids)
    config = renumbered_config(source.config, ids)
    tokenizer = _load(source, folder, config)
    _check_ids(specification, ids, tokenizer)
    if options.vocabulary is None:
        _check_same(source, tokenizer, ids, readings)
    tensors = _vocabulary_tensors(source, config)
    described = _describe(source, tokenizer, options, readings, counts, kept)
    described["left_out_files"] = _left_out(source)
    keeps = KeptTokens(tuple(kept), rows, tensors, folder, described)
    return SourceOfKeptTokens(
        source.name,
        source.folder,
        source.gguf,
        config,
        source.whole,
        source.trust_remote_code,
        dense=source,
        kept=keeps,
        small_tokenizer=tokenizer,
    )


def stage_files(source: Source, folder: Path) -> None:
    """Write all files that join a result beside the weights: `stage_companions`, or those of a cut vocabulary.

    Raises:
        CheckpointError: as `stage_companions`.
        OSError: the folder can't be written.
    """
    if isinstance(source, SourceOfKeptTokens):
        shutil.copytree(source.kept.folder, folder, dirs_exist_ok=True)
    else:
        stage_companions(source, folder)


def _specification(source: Source, folder: Path) -> Specification:
    """Put the files that join a result into a folder, and read the tokenizer's.

    Raises:
        UnsupportedModelError: there is no tokenizer.json, or of a kind whose vocabulary can't be cut.
    """
    if getattr(source.tokenizer, "backend_tokenizer", None) is None:
        raise refused(f"{type(source.tokenizer).__name__} is no tokenizer of the tokenizers library")
    stage_companions(source, folder)
    path = folder / TOKENIZER
    if not path.is_file():
        raise refused(f"{source.name} has no {TOKENIZER}")
    content = read_json(path, folder, "a tokenizer.json as tokenizers saves it", LARGEST_VOCABULARY)
    return read_specification(content, int(source.config.vocab_size))


def _named(source: Source, specification: Specification, folder: Path) -> set[int]:
    """Ids that the tokenizer's steps and lists of special tokens, the config and the generation config name."""
    found = ids_of_steps(specification.content) | named_ids(source.config.to_dict())
    found |= {i for i in source.tokenizer.convert_tokens_to_ids(_listed(source.tokenizer)) if i is not None}
    path = folder / GENERATION
    return found | named_ids(read_json(path, folder, "a JSON object") if path.is_file() else {})


def _listed(tokenizer: Any) -> list[str]:
    """Special tokens that transformers adds from the tokenizer's own config, whatever tokenizer.json has."""
    return [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or ()]


def _rewrite(folder: Path, specification: Specification, ids: dict[int, int]) -> None:
    """Rewrite the files in a folder that name tokens, and remove those that hold the vocabulary again."""
    for path in list(folder.iterdir()):
        if path.is_file() and is_of_tokenizer(path.name) and path.name not in KEPT_FILES:
            path.unlink()
    content = rewrite_tokenizer(specification, ids)
    (folder / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name, change in ((TOKENIZER_CONFIG, rewrite_tokenizer_config), (GENERATION, renumber)):
        path = folder / name
        if path.is_file():
            write_json(path, change(read_json(path, folder, "a JSON object"), ids))


def _left_out(source: Source) -> list[str]:
    """Names of the checkpoint's tokenizer files that a result doesn't have."""
    if source.gguf:
        return []
    names = (path.name for path in source.folder.iterdir() if path.is_file())
    return sorted(name for name in names if is_of_tokenizer(name) and name not in KEPT_FILES)


def renumbered_config(config: Any, ids: dict[int, int]) -> Any:
    """A copy of transformers' config with new ids and the size of the kept vocabulary; nested configs, too."""
    changed = copy.deepcopy(config)
    values = {k: v for k, v in vars(changed).items() if not isinstance(v, PreTrainedConfig)}
    for name, value in renumber(values, ids).items():
        if value != values[name]:
            setattr(changed, name, value)
    for name, value in vars(changed).items():
        if isinstance(value, PreTrainedConfig):
            setattr(changed, name, renumbered_config(value, ids))
    if getattr(config, "vocab_size", None) is not None:
        changed.vocab_size = len(ids)
    return changed


def _load(source: Source, folder: Path, config: Any) -> Any:
    """transformers' tokenizer of a folder. Old tokenizer configs name no class, so that transformers asks the model's
    config, which isn't part of the folder."""
    path = folder / CONFIG
    write_json(path, config.to_dict() | {"model_type": config.model_type})
    try:
        return load_tokenizer(source.name, folder, None, source.trust_remote_code)
    finally:
        path.unlink()


def _check_ids(specification: Specification, ids: dict[int, int], tokenizer: Any) -> None:
    """Refuse a tokenizer that transformers numbers otherwise than its file."""
    expected = {specification.tokens[old]: new for old, new in ids.items()}
    found = tokenizer.get_vocab()
    if found != expected:
        other = sorted(token for token in expected.keys() | found.keys() if expected.get(token) != found.get(token))
        raise refused(f"transformers gives {other[0]!r} id {found.get(other[0])} instead of {expected.get(other[0])}")


def _check_same(source: Source, tokenizer: Any, ids: dict[int, int], readings: list[Reading]) -> None:
    """Refuse a tokenizer that splits the texts otherwise with the kept tokens."""
    different = first_difference(source.tokenizer, tokenizer, ids, readings)
    if different:
        raise refused(f"with the tokens that the texts need, they are split otherwise: {different}")


def _embedding(source: Source) -> Callable[[], Iterator[Tensor]]:
    """A function that gives the rows of the dense model's embedding in pieces."""
    name = lookup(source.config).embeddings[0] + ".weight"
    stored = origins(source, empty_model(source.config))[name].stored[0]
    return lambda: source.weights.rows(stored, PIECE)


def _vocabulary_tensors(source: Source, config: Any) -> frozenset[str]:
    """Names of the checkpoint's tensors with a row for each token: their parameters' shapes follow the vocabulary.

    Raises:
        UnsupportedModelError: a parameter holds the vocabulary in another way.
    """
    dense, small = (
        {k: tuple(p.shape) for k, p in empty_model(c).state_dict().items()} for c in (source.config, config)
    )
    changed = [name for name, shape in dense.items() if small[name] != shape]
    found = origins(source, empty_model(source.config))
    for name in changed:
        rows = (source.config.vocab_size, *dense[name][1:]), (config.vocab_size, *dense[name][1:])
        if (dense[name], small[name]) != rows or found[name].converter is not None:
            raise refused(f"{name} of a {source.config.model_type} model has no row for each token")
    return frozenset(stored for name in changed for stored in found[name].stored)


def _describe(
    source: Source,
    tokenizer: Any,
    options: SliceOptions,
    readings: list[Reading],
    counts: Counter[int],
    kept: list[int],
) -> dict[str, Any]:
    """Return the manifest's section on the cut."""
    lengths = readings
    if options.vocabulary_from:  # the calibration texts are others
        more = read_texts(options.calibration, source.tokenizer, MEASURED, warn=False)
        lengths = list({reading.description: reading for reading in [*readings, *more]}.values())
    chosen = set(kept)
    used = sum(counts.values())
    return {
        "dense": int(source.config.vocab_size),
        "dense_tokens": len(source.tokenizer),
        "kept": len(kept),
        "chosen": "number" if options.vocabulary is not None else "needed",
        "texts": [{"data": reading.description, "characters": len(reading.text)} for reading in readings],
        "share_of_text": sum(count for i, count in counts.items() if i in chosen) / used if used else 1.0,
        "lengths": [length.as_dict() for length in measure_length(source.tokenizer, tokenizer, lengths, MEASURED)],
    }
