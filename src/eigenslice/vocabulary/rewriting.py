"""A tokenizer.json with fewer tokens, and ids in all files that name tokens by ids."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from eigenslice.vocabulary.specification import Specification, refused

ONE = re.compile(r"(^|_)token_id$")
"""Names of fields that hold the id of a token, or several in a list."""
SEVERAL = re.compile(r"((^|_)token_ids|^(begin_)?suppress_tokens)$")
"""Names of fields that hold a list of ids. Ids of other tokens can't occur, and are left out."""
SEQUENCES = ("bad_words_ids", "force_words_ids")
"""Names of fields that hold lists of sequences of ids."""
SUPPRESSED = re.compile(r"^(begin_)?suppress_tokens$")

Ids = Mapping[int, int]
"""New id of each old id that is kept."""


def renumbering(kept: Iterable[int]) -> dict[int, int]:
    """New ids of kept tokens: 0, 1, 2 and so on in the order of the old ids."""
    return {old: new for new, old in enumerate(sorted(kept))}


def rewrite_tokenizer(specification: Specification, ids: Ids) -> dict[str, Any]:
    """The content of tokenizer.json with the kept tokens, merges between them in the old order, and new ids.

    Raises:
        UnsupportedModelError: added tokens don't come last, so that tokenizers would number them otherwise.
    """
    content = copy.copy(specification.content)
    content["model"] = _model(specification, ids)
    own = set(specification.model["vocab"]) if specification.kind == "BPE" else {p for p, _ in specification.pieces}
    added = [token for token in specification.added if token["id"] in ids]
    beside = sorted(ids[token["id"]] for token in added if token["content"] not in own)
    if beside != list(range(len(ids) - len(beside), len(ids))):
        raise refused("added tokens have ids before those of other tokens")
    content["added_tokens"] = [token | {"id": ids[token["id"]]} for token in added]
    if content.get("padding"):
        content["padding"] = content["padding"] | {"pad_id": _known(content["padding"]["pad_id"], ids)}
    if content.get("post_processor"):
        content["post_processor"] = _processor(content["post_processor"], ids)
    return content


def _model(specification: Specification, ids: Ids) -> dict[str, Any]:
    """The part of tokenizer.json with vocabulary and merges."""
    model = dict(specification.model)
    if specification.kind == "Unigram":
        model["vocab"] = [[*piece] for number, piece in enumerate(model["vocab"]) if number in ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["unk_id"]]
        return model
    model["vocab"] = {token: ids[number] for token, number in model["vocab"].items() if number in ids}
    kept = model["vocab"]
    model["merges"] = [
        merge
        for merge, (left, right) in zip(model["merges"], specification.merges, strict=True)
        if left in kept and right in kept and left + right in kept
    ]
    return model


def _processor(processor: dict[str, Any], ids: Ids) -> dict[str, Any]:
    """The step that puts special tokens around a text."""
    kind, changed = processor.get("type"), dict(processor)
    if kind == "Sequence":
        changed["processors"] = [_processor(part, ids) for part in processor["processors"]]
    elif kind == "TemplateProcessing":
        special = processor["special_tokens"]
        changed["special_tokens"] = {
            name: token | {"ids": [_known(i, ids) for i in token["ids"]]} for name, token in special.items()
        }
    elif kind in ("BertProcessing", "RobertaProcessing"):
        changed |= {end: [processor[end][0], _known(processor[end][1], ids)] for end in ("sep", "cls")}
    return changed


def _known(number: int, ids: Ids) -> int:
    if number not in ids:
        raise refused(f"tokenizer.json names id {number}, which no token has")
    return ids[number]


def ids_of_steps(content: Mapping[str, Any]) -> set[int]:
    """Ids that a tokenizer.json names beside its tokens: for padding, and around a text."""
    padding, processor = content.get("padding"), content.get("post_processor")
    return ({padding["pad_id"]} if padding else set()) | (_ids_of_processor(processor) if processor else set())


def _ids_of_processor(processor: dict[str, Any]) -> set[int]:
    kind = processor.get("type")
    if kind == "Sequence":
        return set().union(*map(_ids_of_processor, processor["processors"]))
    if kind == "TemplateProcessing":
        return {i for token in processor["special_tokens"].values() for i in token["ids"]}
    return {processor[end][1] for end in ("sep", "cls")} if kind in ("BertProcessing", "RobertaProcessing") else set()


def rewrite_tokenizer_config(content: dict[str, Any], ids: Ids) -> dict[str, Any]:
    """The content of tokenizer_config.json with new ids."""
    decoder = content.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return dict(content)
    entries = {ids[int(number)]: entry for number, entry in decoder.items() if int(number) in ids}
    return content | {"added_tokens_decoder": {str(number): entries[number] for number in sorted(entries)}}


def named_ids(content: Mapping[str, Any]) -> set[int]:
    """Ids of tokens that a config needs: beginning and end of a text, padding and the like; nested configs, too."""
    found: set[int] = set()
    for name, value in content.items():
        if isinstance(value, dict):
            found |= named_ids(value)
        elif _names_tokens(name) and not SUPPRESSED.search(name):
            values = value if isinstance(value, list) else [value]
            found |= {i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0}
    return found


def _names_tokens(name: Any) -> bool:
    """Return whether a field's name says that the field holds ids; in id2label and the like, names are numbers."""
    return isinstance(name, str) and bool(ONE.search(name) or SEVERAL.search(name))


def renumber(content: Mapping[str, Any], ids: Ids) -> dict[str, Any]:
    """Return a config's content with new ids, nested configs too. An id of no kept token becomes null, or is left out
    of its list. Negative ids stay, because they stand for nothing."""
    return {name: _renumbered(name, value, ids) for name, value in content.items()}


def _renumbered(name: Any, value: Any, ids: Ids) -> Any:
    if isinstance(value, dict):
        return renumber(value, ids)
    if name in SEQUENCES and isinstance(value, list):
        return _sequences(value, ids) or None
    if name == "sequence_bias" and isinstance(value, list):
        return [[[ids[i] for i in s], bias] for s, bias in value if all(i in ids for i in s)] or None
    if name == "forced_decoder_ids" and isinstance(value, list):
        return [[place, ids[i]] for place, i in value if i in ids] or None
    if not _names_tokens(name):
        return value
    if isinstance(value, list):
        return [ids.get(i, i) for i in value if i in ids or i < 0] or None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return ids.get(value)
    return value


def _sequences(sequences: list[Any], ids: Ids) -> list[Any]:
    """Sequences of kept tokens, or lists of such sequences of which one has to come; the others can't occur."""
    found = []
    for sequence in sequences:
        if any(isinstance(part, list) for part in sequence):
            found.append(_sequences(sequence, ids))
        elif all(i in ids for i in sequence):
            found.append([ids[i] for i in sequence])
    return [sequence for sequence in found if sequence]
