"""Prompts that models go on from: a built-in set, or the lines and records of texts."""

import warnings

from eigenslice.data.presets import BUILTIN
from eigenslice.data.sources import one_by_one
from eigenslice.data.text_files import local_path, open_file
from eigenslice.data.texts import load_documents
from eigenslice.errors import EigensliceWarning, printable
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.options.reporting import PROMPTS

CHARACTERS = 4096
"""Characters of a text that are read for each prompt."""
EVERYDAY = (
    *PROMPTS,
    "My favourite thing to do on a Sunday morning is",
    "To make a good cup of tea, first",
    "The weather tomorrow will be",
    "Dear Sir or Madam, I am writing to",
    "The three largest cities in Europe are",
    "If you want to learn a new language, you should",
    "She opened the door and saw",
    "The main difference between cats and dogs is that",
    "Q: Why is the sky blue?\nA:",
    "In 1969, for the first time,",
    "Ingredients: two eggs, a cup of flour,",
    "The train was late, so we decided to",
    "A healthy breakfast should have",
    "The doctor told him that",
    "Here are five ways to save money:\n1.",
    "The company announced on Monday that",
    "Plants need sunlight because",
    "When I was a child, my grandmother used to",
    "def is_even(number):",
    "The old man sat by the river and",
    "To get to the station, turn left and then",
)
"""Everyday beginnings of stories, facts, instructions, letters and code."""


def load_prompts(texts: CalibrationOptions, most: int) -> list[str]:
    """Return the first prompts of each text, without white space at their ends.

    The built-in text is EVERYDAY. A file of plain text has a prompt on each line that isn't blank. In all other texts
    each record is a prompt.

    Args:
        texts: The texts, and their fields.
        most: Largest number of prompts of a text.

    Raises:
        CalibrationError: a text can't be read, or has no text.
    """
    prompts: list[str] = []
    for text in one_by_one(texts):
        (name,) = text.data
        found = EVERYDAY if name == BUILTIN else _prompts_of(name, text, most * CHARACTERS)
        prompts += [prompt.strip() for prompt in found if prompt.strip()][:most]
    return prompts


def _prompts_of(name: str, text: CalibrationOptions, characters: int) -> list[str]:
    field = text.field[0] if text.field else None
    documents = load_documents(name, field, "evaluation", characters, text.seed)
    for note in documents.notes:
        warnings.warn(printable(note), EigensliceWarning, stacklevel=3)
    path = local_path(name)
    plain = path is not None and path.is_file() and open_file(path).kind == "text"
    return [line for document in documents.texts for line in document.splitlines()] if plain else documents.texts
