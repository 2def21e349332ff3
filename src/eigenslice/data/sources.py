"""The texts behind the user's names: mixtures become their members, and each text gets its field."""

from dataclasses import dataclass
from pathlib import Path

from eigenslice.data.presets import BUILTIN, MIXTURES, PRESETS
from eigenslice.data.text_files import local_path
from eigenslice.errors import CalibrationError
from eigenslice.options.calibration_text import CalibrationOptions


@dataclass(frozen=True)
class Source:
    """One text, as `load_documents` takes it; field None is the preset's own, or "text"."""

    data: str
    field: str | None

    @property
    def token_ids(self) -> Path | None:
        """The file of token ids that it is, if it is one.

        Raises:
            CalibrationError: it should be one, and isn't there or can't be read.
        """
        if Path(self.data).suffix.lower() != ".safetensors":
            return None
        path = local_path(self.data)
        return path if path and path.is_file() else None


def _named(options: CalibrationOptions) -> list[Source]:
    """All texts that the options name, in their order; a mixture's members in its place."""
    names, fields = tuple(options.data), tuple(options.field or ())
    named: list[Source] = []
    for number, name in enumerate(names):
        if len(fields) == len(names):
            field = fields[number] or None
        else:
            own = name == BUILTIN or name in PRESETS or name in MIXTURES
            field = fields[0] if fields and not own else None
        named += [Source(member, field) for member in MIXTURES.get(name, (name,))]
    return named


def one_by_one(options: CalibrationOptions) -> list[CalibrationOptions]:
    """The same options for each text alone, none of them twice: to measure a perplexity on each."""
    return [
        options.model_copy(update={"data": (source.data,), "field": (source.field,) if source.field else ()})
        for source in dict.fromkeys(_named(options))
    ]


def sources(options: CalibrationOptions) -> list[Source]:
    """The texts to mix, in their order.

    Raises:
        CalibrationError: one of them twice, or token ids among others.
    """
    chosen = _named(options)
    twice = [source.data for number, source in enumerate(chosen) if source in chosen[:number]]
    if twice:
        raise CalibrationError(
            f"{twice[0]} is there twice",
            allowed="each text once; all have equal shares"
            + "".join(f", and {name} stands for {', '.join(members)}" for name, members in MIXTURES.items()),
            next_step=f"leave one {twice[0]} out",
        )
    ids = next((source for source in chosen if source.token_ids), None)
    if ids and len(chosen) > 1:
        raise CalibrationError(
            f"{ids.data} holds token ids, and there are {len(chosen) - 1} other texts",
            allowed="either one file of token ids, or any number of texts",
            next_step="mix the token ids when you write the file, or pass the texts alone",
        )
    return chosen
