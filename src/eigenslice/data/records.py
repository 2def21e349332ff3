"""From records to texts: the fields to read, unusable records, and the warnings about them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eigenslice.data.conversations import Conversation, conversation_of, turns_in
from eigenslice.data.formats import Broken, Records
from eigenslice.data.unusable import UnusableError, fields_of, kind_of
from eigenslice.errors import CalibrationError

PATIENCE = 10_000  # records of a stream, which may have no end, among which one has to be of use
NEXT = "name the text field with --field, or several as --field instruction,output"


@dataclass(frozen=True)
class Reading:
    """Options of reading records.

    Attributes:
        named: Fields that the user named, joined by a line break; () for none.
        own: Field with the text if no field is named.
        write: Function that writes conversations.
        first: Records that are conversations are read as such even if they have a text of their own.
    """

    named: tuple[str, ...]
    own: str
    write: Callable[[Conversation], str]
    first: bool = False

    def is_record(self, value: dict[str, Any]) -> bool:
        """Return whether an object is a record; another object may hold a list of records."""
        if self.named:
            return any(name in value for name in self.named)
        try:
            return isinstance(value.get(self.own), str) or conversation_of(value) is not None
        except UnusableError:
            return True


@dataclass
class Texts:
    """Texts of records, and counts of the records' kinds.

    Attributes:
        texts: The texts; no text is blank.
        conversations: Number of conversations.
        more: True if records were left to read.
    """

    texts: list[str] = field(default_factory=list)
    conversations: int = 0
    more: bool = False
    _records: int = 0
    _length: int = 0
    _kinds: Counter[str] = field(default_factory=Counter)
    _first: dict[str, str] = field(default_factory=dict)
    _reason: UnusableError | None = None
    _blank: int = 0

    def read(self, records: Records, reading: Reading, characters: int, patience: int | None = None) -> "Texts":
        """Read records until there are so many characters.

        Args:
            records: The records.
            reading: The options of reading.
            characters: Number of characters that is enough.
            patience: Number of unusable records after which reading ends, if no record was usable; None reads all
                records.
        """
        for number, record in records.numbered:
            if self._length >= characters:
                self.more = True
                break
            self._add(record, reading, f"{records.unit} {number}")
            if self._records == patience and not self.texts:
                break
        return self

    def _add(self, record: Any, reading: Reading, place: str) -> None:
        self._records += 1
        try:
            text = self._text(record, reading, place)
        except UnusableError as error:
            self._count("unusable", f"{place} {error}{_fields(record)}")
            self._blank += error.blank
            self._reason = self._reason or error
            return
        if not _encodable(text):
            self._count("halves", place)
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text.strip():
            self.texts.append(text)
            self._length += len(text)

    def _text(self, record: Any, reading: Reading, place: str) -> str:
        if isinstance(record, str):
            return record
        if isinstance(record, Broken):
            raise UnusableError(record.reason)
        if not isinstance(record, dict):
            raise UnusableError(f"is {kind_of(record)}")
        own = record.get(reading.own)
        if not reading.named and not reading.first and isinstance(own, str) and own.strip():
            return own
        conversation = _conversation(record, reading)
        if conversation is None:
            return _joined(record, reading.named or (reading.own,))
        text = reading.write(conversation)
        if not text.strip():
            raise UnusableError("is a conversation without text")
        self.conversations += 1
        if conversation.left_out:
            self._count("parts", f"{place} ({', '.join(dict.fromkeys(conversation.left_out))})")
        return text

    def _count(self, kind: str, first: str) -> None:
        self._kinds[kind] += 1
        self._first.setdefault(kind, first)

    def notes(self, where: str, blanks_are_usual: bool) -> list[str]:
        """Return notes on the records for warnings to the user."""
        notes = []
        unusable = self._kinds["unusable"]
        if unusable > (self._blank if blanks_are_usual else 0):
            notes.append(
                f"{where}: {unusable} of {self._records} records can't be used and are left out. "
                f"The first: {self._first['unusable']}."
            )
        if self._kinds["parts"]:
            notes.append(
                f"{where}: {self._kinds['parts']} of {self._records} records have parts that aren't text, which are "
                f"left out. The first: {self._first['parts']}."
            )
        if self._kinds["halves"]:
            notes.append(
                f"{where}: {self._kinds['halves']} of {self._records} records have halves of surrogate pairs, which "
                f"are no characters; each becomes U+FFFD. The first: {self._first['halves']}."
            )
        return notes

    def require(self, where: str, chat_template: bool) -> None:
        """Raise a CalibrationError if there is no text."""
        if self.texts:
            return
        if self._reason is None or self._blank == self._records:
            raise CalibrationError(
                f"{where} holds no text" + (f": {self._first['unusable']}" if self._reason else ""),
                allowed="at least one document that is not empty",
                next_step="check the file, or --field",
            )
        none = "its only record can't" if self._records == 1 else f"none of {self._records} records can"
        raise CalibrationError(
            f"{where}: {none} be used. The first: {self._first['unusable']}",
            allowed="strings; records with text in the field; conversations: messages, or a question and an answer"
            + (", that the chat template takes" if chat_template else ""),
            next_step=self._reason.next_step or NEXT,
        )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fields(record: Any) -> str:
    return f"; it has {fields_of(record)}" if isinstance(record, dict) else ""


def _conversation(record: dict[str, Any], reading: Reading) -> Conversation | None:
    if not reading.named:
        return conversation_of(record)
    only = reading.named[0]
    if len(reading.named) == 1 and turns_in(record.get(only)):
        return conversation_of({"messages": record[only], "tools": record.get("tools")})
    return None


def _joined(record: dict[str, Any], names: tuple[str, ...]) -> str:
    texts = [_field(record, name) for name in names]
    text = "\n".join(text for text in texts if text)
    if not text.strip():
        raise UnusableError(f"has an empty {' and '.join(names)}", blank=True)
    return text


def _field(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    content = kind_of(value) if name in record else "there is none"
    raise UnusableError(f"has no text in field {name} ({content})")
