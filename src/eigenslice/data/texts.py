"""Documents from presets, files and the hub."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eigenslice.data.builtin import language_reference, library_docstrings
from eigenslice.data.conversations import Conversation
from eigenslice.data.formats import LARGEST, read_records, read_text, records_in
from eigenslice.data.hub_sets import hub_records, parse_hub
from eigenslice.data.presets import ALLOWED, BUILTIN, MIXTURES, PRESETS, HubText, Purpose
from eigenslice.data.records import PATIENCE, Reading, Texts
from eigenslice.data.text_files import local_path, open_file
from eigenslice.errors import CalibrationError

__all__ = ["ALLOWED", "BUILTIN", "MIXTURES", "PRESETS", "Chat", "Documents", "Purpose", "load_documents"]


@dataclass(frozen=True)
class Chat:
    """Options of writing conversations.

    Attributes:
        write: Function that writes a conversation in a chat template, or as plain text.
        template: True if it writes in a template.
        first: Read records as conversations even if they have a text of their own.
        note: Warning if conversations are found.
    """

    write: Callable[[Conversation], str] = lambda conversation: conversation.plain
    template: bool = False
    first: bool = False
    note: str = ""


@dataclass(frozen=True)
class Documents:
    """Texts, their origin, and the separator between two texts.

    Attributes:
        texts: The texts; no text is blank.
        description: Entry of the manifest.
        separator: Separator between two texts.
        more: True if a larger number of characters gives more text.
        notes: Warnings.
    """

    texts: list[str] = field(repr=False)
    description: str
    separator: str = "\n\n"
    more: bool = False
    notes: tuple[str, ...] = ()


def load_documents(
    data: str, name: str | None, purpose: Purpose, characters: int, seed: int, chat: Chat | None = None
) -> Documents:
    """Load texts.

    Args:
        data: Preset, file or hub data set.
        name: Field of records that holds the text, or several joined by commas; None is the preset's, or "text".
        purpose: The purpose decides the split of a preset.
        characters: Number of characters that is enough. Large hub data sets and files to evaluate on are read only that
            far. Other files are read up to LARGEST characters.
        seed: Seed for the order in which large hub data sets are read to calibrate.
        chat: Options of writing conversations; None writes plain text.

    Raises:
        CalibrationError: nothing there, unreadable, wrong field, or no text.
    """
    if data == BUILTIN:
        reference = purpose == "calibration"
        texts = language_reference() if reference else library_docstrings()
        return Documents(texts, f"Python {'language reference' if reference else 'library docstrings'}")
    chat = chat or Chat()
    if data in PRESETS:
        return _data_set(data, PRESETS[data], name, purpose, characters, seed, chat)
    path = local_path(data)
    if path is None or path.is_dir():
        return _data_set(data, parse_hub(data), name, purpose, characters, seed, chat)
    enough = min(characters, LARGEST) if purpose == "evaluation" else LARGEST
    return _file(data, path, _reading(name, "text", chat), enough, chat)


def _file(data: str, path: Path, reading: Reading, enough: int, chat: Chat) -> Documents:
    file, notes = open_file(path), []
    if file.kind == "text":
        text, more = read_text(file, enough)
        texts = Texts([text] if text.strip() else [], more=more)
        records = records_in(text)
        if records:
            notes.append(
                f"{data} holds {records}, and is read as plain text. To read records, name it .jsonl or .json."
            )
    else:
        texts = Texts().read(read_records(file, reading.is_record), reading, enough)
    return _documents(texts, data, path.name, chat, enough, notes)


def _data_set(
    data: str, hub: HubText, name: str | None, purpose: Purpose, characters: int, seed: int, chat: Chat
) -> Documents:
    split = getattr(hub, purpose)
    records = hub_records(hub, split, seed if purpose == "calibration" else None)
    enough, patience = (min(characters, LARGEST), PATIENCE) if hub.stream else (LARGEST, None)
    texts = Texts().read(records, _reading(name, hub.field, chat), enough, patience)
    description = f"{data} ({split})" if data in PRESETS else data
    return _documents(texts, data, description, chat, enough, [])


def _documents(texts: Texts, data: str, description: str, chat: Chat, enough: int, notes: list[str]) -> Documents:
    """Return the found texts with their warnings.

    Raises:
        CalibrationError: there is no text.
    """
    texts.require(data, chat.template)
    notes = notes + texts.notes(data, blanks_are_usual=data in PRESETS)
    if texts.conversations and chat.note:
        notes.append(f"{data}: {chat.note}")
    if texts.more and enough == LARGEST:
        notes.append(
            f"{data} has more than {LARGEST} characters, of which only the first {LARGEST} are read. For others, pass "
            "a sample of it."
        )
    more = texts.more and enough < LARGEST
    if chat.template and texts.conversations == len(texts.texts):
        description = f"{description}, chat template"
        return Documents(texts.texts, description, "", more, tuple(notes))  # templates end their texts
    return Documents(texts.texts, description, more=more, notes=tuple(notes))


def _reading(name: str | None, own: str, chat: Chat) -> Reading:
    named = tuple(part.strip() for part in (name or "").split(",") if part.strip())
    if name and not named:
        raise CalibrationError(
            f"--field {name!r} names no field",
            allowed="a field, or several joined by commas",
            next_step="leave it out, or name one",
        )
    return Reading(named, own, chat.write, chat.first)
