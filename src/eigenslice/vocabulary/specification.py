"""The content of a tokenizer.json: ids of tokens, merges, and tokens that must stay."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eigenslice.errors import UnsupportedModelError

KINDS = ("BPE", "Unigram")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Tokens that stand for single bytes, where a tokenizer falls back to bytes."""
SPACE = "\u2581"
"""SentencePiece's mark of a space."""
RESERVED = re.compile(r"[<\[]\|?(unused|reserved(_special)?(_token)?)_?\d+\|?[>\]]")
"""Names of added tokens that stand for nothing yet: 6,242 of Gemma 3's tokens, 248 of Llama 3's."""
SEPARATE_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def refused(found: str) -> UnsupportedModelError:
    """Return the error for a tokenizer with a vocabulary that can't be cut."""
    return UnsupportedModelError(
        f"the vocabulary can't be cut: {found}",
        allowed="a tokenizer.json of kind BPE (of bytes, or of pieces with or without bytes as fallback) or Unigram",
        next_step="leave --vocabulary and --vocabulary-from out, or save the tokenizer as a tokenizer.json first",
    )


@dataclass(frozen=True)
class Specification:
    """The content of a tokenizer.json with a vocabulary that can be cut.

    Attributes:
        content: The whole dictionary.
        kind: BPE or Unigram.
        ids: Id of each token, added tokens included.
    """

    content: dict[str, Any]
    kind: str
    ids: dict[str, int]

    @property
    def model(self) -> dict[str, Any]:
        """The part with vocabulary and merges."""
        return self.content["model"]

    @property
    def added(self) -> list[dict[str, Any]]:
        """Added tokens, special tokens among them."""
        return self.content["added_tokens"]

    @property
    def falls_back_to_bytes(self) -> bool:
        """True if text that no token covers becomes tokens of single bytes."""
        return bool(self.model.get("byte_fallback")) and all(token in self.ids for token in BYTES)

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """Unigram's pieces with their scores, in the order of their ids."""
        return [(piece, score) for piece, score in self.model["vocab"]]

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Token of each id."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """BPE's merges, the first one first. tokenizer.json has pairs, or in older files both parts in one text."""
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self.model["merges"])
        return [(left, right) for left, right in pairs]

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """Place of each merge in the order. Of a merge that is listed twice, the last place counts, as it does in
        tokenizers."""
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def indispensable(self) -> frozenset[str]:
        """Return tokens without which some text has no encoding, or kept text has another encoding.

        These are added tokens (special tokens among them, but none that stand for nothing), the unknown token, and the
        alphabet. The alphabet is the tokens of single bytes, or all tokens of one character if there are no tokens of
        bytes. Of Unigram, one piece of the least score stays, because the score of unknown characters is measured from
        the least score.
        """
        found = {token["content"] for token in self.added if not RESERVED.fullmatch(token["content"])}
        singles = {token for token in self.ids if len(token) == 1}
        if self.falls_back_to_bytes:
            found |= {*BYTES} | {token for token in singles if token.isascii() or token == SPACE}
        else:
            found |= singles
        if self.kind == "Unigram":
            pieces, unknown = self.pieces, self.model.get("unk_id")
            found |= {min(pieces, key=lambda piece: piece[1])[0]}
            found |= set() if unknown is None else {pieces[unknown][0]}
        elif self.model.get("unk_token") in self.ids:
            found.add(self.model["unk_token"])
        return frozenset(found)


def read_specification(content: dict[str, Any], rows: int | None = None) -> Specification:
    """Read the content of a tokenizer.json.

    Args:
        content: The content.
        rows: Rows of the embedding. Added tokens without a row are passed over: the model can't read these. None is
            as many rows as there are tokens.

    Raises:
        UnsupportedModelError: the vocabulary of such a tokenizer can't be cut.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise refused("tokenizer.json holds no model")
    kind = _kind(model)
    if kind not in KINDS:
        raise refused(f"the tokenizer is of kind {kind}")
    affixes = [name for name in SEPARATE_AFFIXES if model.get(name)]
    if affixes:
        raise refused(f"the tokenizer marks the parts of words ({', '.join(affixes)})")
    if model.get("dropout"):
        raise refused(f"the tokenizer leaves out merges at random (dropout {model['dropout']})")
    try:
        if kind == "BPE":
            ids = {str(token): int(number) for token, number in model["vocab"].items()}
            model["merges"][:0]
        else:
            ids = {str(piece): number for number, (piece, _) in enumerate(model["vocab"])}
        count, added = len(ids), content.get("added_tokens") or []
        if rows is not None:
            added = [token for token in added if token["id"] < rows or token["content"] in ids]
        ids |= {str(token["content"]): int(token["id"]) for token in added}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refused(f"tokenizer.json is no {kind} tokenizer as tokenizers writes it") from error
    if len(set(ids.values())) < len(ids) or (kind == "Unigram" and count < len(model["vocab"])):
        raise refused("the tokenizer has one id, or one piece, twice")
    if rows is not None and max(ids.values(), default=0) >= rows:
        raise refused(f"the tokenizer has token {max(ids.values())}, the embedding has {rows} rows")
    return Specification(content | {"added_tokens": added}, kind, ids)


def _kind(model: dict[str, Any]) -> str:
    """The kind of a tokenizer. Old files don't name the kind."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece or WordLevel"


def merged_from(specification: Specification, token: str) -> frozenset[str]:
    """A token and all tokens that occur while the token is made, from its characters on.

    BPE merges the pair with the lowest rank, the leftmost of several, until no pair has a merge. No merge crosses the
    bounds of a token in the end result. So the merges within a token are the same in every text that has the token. A
    vocabulary with these tokens, and the merges between them in the old order, makes the same choices.
    A token that no merges make, such as one that stands for a whole word only (ignore_merges), is alone.
    Unigram's pieces aren't made from others.
    """
    if specification.kind == "Unigram":
        return frozenset({token})
    ranks, parts = specification.ranks, list(token)
    found = {token, *(part for part in parts if part in specification.ids)}
    while len(parts) > 1:
        pairs = [(ranks.get(pair), place) for place, pair in enumerate(itertools.pairwise(parts))]
        known = [(rank, place) for rank, place in pairs if rank is not None]
        if not known:
            break
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found.add(parts[place])
    return frozenset(found) if len(parts) == 1 else frozenset({token})


def closed(specification: Specification, tokens: Iterable[str]) -> set[str]:
    """Tokens with all that these are merged from."""
    return set().union(*(merged_from(specification, token) for token in tokens))
