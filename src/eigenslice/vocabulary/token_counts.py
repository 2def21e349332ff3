"""Texts that decide which tokens stay: reading, counting tokens, comparing two tokenizers."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from eigenslice.data.sources import sources
from eigenslice.data.templates import ChatTemplate
from eigenslice.data.texts import Chat, load_documents
from eigenslice.errors import CalibrationError, EigensliceWarning, first_line, printable
from eigenslice.options.calibration_text import CalibrationOptions

PART = 2**20
"""Characters that are encoded at once: tokenizers need a hundred times the memory of a text."""
OVERLAP = 2**10
"""Characters that a part shares with the part before, so that tokens at the cut are met whole."""


@dataclass(frozen=True)
class Reading:
    """A text as a whole, and its description."""

    description: str
    text: str = field(repr=False)

    def parts(self) -> Iterator[str]:
        """The text in parts of a bounded length, which overlap."""
        for start in range(0, max(1, len(self.text) - OVERLAP), PART - OVERLAP):
            yield self.text[start : start + PART]


@dataclass(frozen=True)
class Length:
    """Tokens of the same characters before and after the cut of the vocabulary.

    Attributes:
        description: The text.
        characters: Characters that were encoded, in all parts.
        before: Tokens of the dense model's tokenizer.
        after: Tokens of the result's tokenizer.
    """

    description: str
    characters: int
    before: int
    after: int

    def as_dict(self) -> dict[str, Any]:
        """The numbers for the manifest."""
        return {
            "data": self.description,
            "characters": self.characters,
            "tokens_before": self.before,
            "tokens_after": self.after,
        }


def read_texts(options: CalibrationOptions, tokenizer: Any, characters: int, *, warn: bool) -> list[Reading]:
    """Read texts as a whole, with conversations in the tokenizer's chat template.

    Args:
        options: The options of the texts.
        tokenizer: The dense model's tokenizer.
        characters: Number of characters that are read of a large data set on the hub.
        warn: True to warn of odd records. Calibration on the same text warns itself.

    Raises:
        CalibrationError: a text can't be read, or is a file of token ids.
    """
    readings = []
    for source in sources(options):
        if source.token_ids:
            raise CalibrationError(
                f"{source.data} holds token ids, and the vocabulary is to be cut",
                allowed="texts: their token ids are others after the cut",
                next_step="pass the text itself, or leave --vocabulary and --vocabulary-from out",
            )
        with ChatTemplate(tokenizer) as template:
            chat = Chat(template, True) if getattr(tokenizer, "chat_template", None) else Chat()
            documents = load_documents(source.data, source.field, "calibration", characters, options.seed, chat)
        for note in documents.notes if warn else ():
            warnings.warn(printable(note), EigensliceWarning, stacklevel=4)
        readings.append(Reading(documents.description, documents.separator.join(documents.texts)))
    return readings


def encode(tokenizer: Any, text: str, description: str) -> list[int]:
    """Token ids of a text, with the special tokens around a text.

    Raises:
        CalibrationError: the tokenizer can't encode the text.
    """
    try:
        return tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise their own
        raise CalibrationError(
            f"the tokenizer can't read {description} ({first_line(error)})",
            allowed="text that the model's own tokenizer takes",
            next_step="check that the tokenizer files in the folder belong to the model",
        ) from error


def count_tokens(tokenizer: Any, readings: Iterable[Reading]) -> Counter[int]:
    """Count the occurrences of each token in texts, by id."""
    counts: Counter[int] = Counter()
    for reading in readings:
        for part in reading.parts():
            counts.update(encode(tokenizer, part, reading.description))
    return counts


def measure_length(before: Any, after: Any, readings: Iterable[Reading], most: int) -> list[Length]:
    """Tokens of texts before and after the cut of the vocabulary.

    Args:
        before: The dense model's tokenizer.
        after: The tokenizer with the kept tokens.
        readings: The texts.
        most: Characters of each text that are encoded.
    """
    found = []
    for reading in readings:
        parts = list(Reading(reading.description, reading.text[:most]).parts())
        tokens = [sum(len(encode(t, part, reading.description)) for part in parts) for t in (before, after)]
        found.append(Length(reading.description, sum(map(len, parts)), *tokens))
    return found


def first_difference(before: Any, after: Any, ids: dict[int, int], readings: Iterable[Reading]) -> str | None:
    """Return the first place where two tokenizers split a text into other tokens, in words; None if there is none.

    Args:
        before: The dense model's tokenizer.
        after: The tokenizer with the kept tokens.
        ids: New id of each kept token.
        readings: The texts.
    """
    for reading in readings:
        for part in reading.parts():
            old, new = (encode(tokenizer, part, reading.description) for tokenizer in (before, after))
            expected = [ids.get(i) for i in old]
            if expected != new:
                place = next((n for n, pair in enumerate(zip(expected, new, strict=False)) if pair[0] != pair[1]), 0)
                tokens = before.convert_ids_to_tokens(old[place : place + 3])
                return f"{tokens} in {reading.description} become {after.convert_ids_to_tokens(new[place : place + 3])}"
    return None
