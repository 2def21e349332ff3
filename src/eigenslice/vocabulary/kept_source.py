"""A dense checkpoint of which some tokens are kept: all that reads the checkpoint sees the small vocabulary."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from eigenslice.checkpoint.names import GENERATION, TOKENIZER_CONFIG
from eigenslice.checkpoint.scan import Span
from eigenslice.checkpoint.source import Source
from eigenslice.checkpoint.weights import Weights
from eigenslice.runtime.reading import read_json

PIECE = 4096
"""Rows of a vocabulary's matrix that are read at once."""


@dataclass(frozen=True)
class KeptTokens:
    """The tokens that stay.

    Attributes:
        ids: Ids of the tokens in the dense model, ascending; a token's new id is its place here.
        rows: Rows of the dense model's embedding.
        tensors: Names of the checkpoint's tensors with a row for each token.
        folder: The rewritten tokenizer, and all other files that join a result.
        description: Entry of the manifest.
    """

    ids: tuple[int, ...]
    rows: int
    tensors: frozenset[str]
    folder: Path
    description: dict[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the kept ids."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()


class PickedWeights:
    """Weights with the rows of kept tokens only in the vocabulary tensors; all other tensors are as stored."""

    def __init__(self, weights: Weights, kept: KeptTokens) -> None:
        self.files = weights.files
        self._weights, self._tensors, self._ids = weights, kept.tensors, torch.tensor(kept.ids)

    def names(self) -> list[str]:
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._weights.shape(name)
        return (len(self._ids), *shape[1:]) if name in self._tensors else shape

    def dtype(self, name: str) -> torch.dtype | None:
        return self._weights.dtype(name)

    def load(self, name: str) -> Tensor:
        """The tensor, or its kept rows."""
        return torch.cat(list(self.rows(name, PIECE))) if name in self._tensors else self._weights.load(name)

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The tensor, or its kept rows, in pieces of at most so many rows."""
        if name not in self._tensors:
            yield from self._weights.rows(name, count)
            return
        start = 0
        for piece in self._weights.rows(name, count):
            inside = self._ids[(self._ids >= start) & (self._ids < start + len(piece))]
            if len(inside):
                yield piece[inside - start]
            start += len(piece)

    def spans(self, file: Path) -> list[Span]:
        """Return the places of the tensors in a file, as stored: all rows are checked."""
        return self._weights.spans(file)


@dataclass(frozen=True)
class SourceOfKeptTokens(Source):
    """A dense checkpoint with kept tokens. `config`, weights and tokenizer have the small vocabulary.

    Attributes:
        dense: The checkpoint with all tokens.
        kept: The tokens that stay.
        small_tokenizer: transformers' tokenizer of these tokens.
    """

    dense: Source
    kept: KeptTokens
    small_tokenizer: Any

    @cached_property
    def weights(self) -> Weights:
        """The tensors, read one at a time; of a vocabulary's, the kept rows."""
        return PickedWeights(self.dense.weights, self.kept)

    @property
    def dropped_rows(self) -> int:
        """Rows of the dense model's embedding that are left out."""
        return self.kept.rows - len(self.kept.ids)

    @property
    def vocabulary(self) -> dict[str, Any]:
        """The manifest's section on the kept tokens."""
        return self.kept.description | {"sha256": self.kept.sha256}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the kept tokens."""
        return self.small_tokenizer

    @cached_property
    def tokenizer_config(self) -> dict[str, Any] | None:
        """Content of the rewritten tokenizer_config.json; None if there is none."""
        path = self.kept.folder / TOKENIZER_CONFIG
        return read_json(path) if path.is_file() else None

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """The generation config with new ids; None if the checkpoint has none."""
        there = (self.kept.folder / GENERATION).is_file()
        return GenerationConfig.from_pretrained(self.kept.folder) if there else None


def keep_rows(model: Any, ids: tuple[int, ...]) -> None:
    """Leave only the rows of kept tokens in a loaded model's embedding and head.

    Args:
        model: transformers' model with the dense vocabulary; changed in place.
        ids: Kept ids, ascending.
    """
    picked = torch.tensor(ids, device=model.device)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[picked], requires_grad=False)
    embedding.num_embeddings = len(ids)
    embedding.padding_idx = None  # it only matters for gradients
    head.weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[picked], requires_grad=False)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[picked], requires_grad=False)
    head.out_features = len(ids)
    model.config.get_text_config().vocab_size = len(ids)


def kept_ids(dense: Any, small: Any) -> tuple[int, ...] | None:
    """Ids of a result's tokens in the dense model, by the tokens themselves; None if these aren't the dense model's.

    Args:
        dense: The dense model's tokenizer.
        small: The result's tokenizer.
    """
    ids, tokens = dense.get_vocab(), sorted(small.get_vocab().items(), key=lambda token: token[1])
    found = [ids.get(token) for token, _ in tokens]
    known = tuple(i for i in found if i is not None)
    return known if known and len(known) == len(found) and list(known) == sorted(known) else None
