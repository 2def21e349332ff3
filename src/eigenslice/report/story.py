"""A manifest in words: the command that made a result, the way to load it, its name."""

import re
from pathlib import Path
from typing import Any

from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.options.flags import Options, flag_of, nested_of
from eigenslice.options.slicing import SliceOptions
from eigenslice.report.escape import python_string, shell_words

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(@\S+)?", re.ASCII)
"""OWNER/NAME, and a revision."""
LONGEST_ID = 200


def slice_command(manifest: dict[str, Any]) -> str:
    """Return the command line that makes a result again, with all options that differ from the defaults."""
    return _command("slice", SliceOptions, manifest["options"])


def finetune_commands(manifest: dict[str, Any]) -> list[str]:
    """Return the command of the recovery fine-tuning; none if there was no training or slicing itself did it."""
    section = manifest.get("finetune")
    if section is None or manifest["options"].get("heal") is not None:
        return []
    return [_command("finetune", FinetuneOptions, section["options"])]


def _command(verb: str, kind: type[Options], options: dict[str, Any]) -> str:
    nested = nested_of(kind) or ""
    parts = ["eigenslice", verb, options["model"], "-o", options["output"]]
    parts += _chosen(kind, options, ("model", "output", "resume", nested))
    if nested:
        default = kind.model_fields[nested].default
        parts += _chosen(type(default), options.get(nested) or {}, (), default.model_dump(mode="json"))
    return shell_words([*map(str, parts)])


def _chosen(
    kind: type[Options], values: dict[str, Any], left_out: tuple[str, ...], defaults: dict[str, Any] | None = None
) -> list[str]:
    """Return the options that differ from the defaults, by default the defaults of the model."""
    usual = defaults or {name: field.default for name, field in kind.model_fields.items()}
    parts: list[str] = []
    for name, value in values.items():
        if name in left_out or value is None or value == usual.get(name) or value in ([], ()):
            continue
        parts += _flags(flag_of(kind, name), value)
    return parts


def _flags(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    return [part for each in (value if isinstance(value, list) else [value]) for part in (flag, str(each))]


def loading_code(manifest: dict[str, Any], name: str) -> str:
    """Python that loads a result."""
    extra = "" if manifest["form"] == "stock" else ", trust_remote_code=True"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({python_string(name)}{extra})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({python_string(name)})"
    )


def source_name(manifest: dict[str, Any]) -> str:
    """The dense model's name: a hub id as it is, of a path its last part."""
    name = manifest["source"]["name"]
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Return whether a name looks like OWNER/NAME on the hub, maybe with a revision, and is no path."""
    if not HUB_ID.fullmatch(name) or len(name) > LONGEST_ID:
        return False
    return not name.startswith(".") and not name.endswith(".gguf") and not Path(name).exists()


def base_model(name: str) -> str | None:
    """The hub id in a model's name, without its revision; None of a path."""
    match = HUB_ID.fullmatch(name) if is_hub_id(name) else None
    return match[1] if match else None


def custom_note(manifest: dict[str, Any]) -> str:
    """Return a note on loading a result in eigenslice's class, and on the reason for this class."""
    plan, source = manifest["plan"], manifest["source"]["model_type"]
    if manifest["options"].get("form") == "custom":
        reason = "as --form custom asked for"
    elif plan["basis"] == "per-block":
        reason = "since no config of transformers has the shortcut matrices of a per-block basis"
    elif isinstance(plan["neurons"], list):
        reason = "since configs of transformers have one number of MLP neurons for all blocks"
    else:
        reason = f"since no config of transformers holds a {source} model sliced so"
    return f"This model loads by eigenslice's class, which lies in the folder, {reason}."


def calibration_text(description: dict[str, Any]) -> str:
    """Return a result's calibration text in words."""
    data = description["data"]
    named = data if isinstance(data, str) else ", ".join(f"{part['data']} ({part['sequences']})" for part in data)
    return f"{description['sequences']} sequences, {description['tokens']:,} tokens: {named}"


def vocabulary_text(section: dict[str, Any]) -> str:
    """Describe the cut of the vocabulary in words, from the manifest's section on it."""
    texts = ", ".join(f"{text['data']} ({text['characters']:,} characters)" for text in section["texts"])
    chosen = "the most used tokens of" if section["chosen"] == "number" else "the tokens that occur in"
    lengths = [length for length in section["lengths"] if length["characters"]]
    grown = ", ".join(
        f"{1000 * length['tokens_before'] / length['characters']:.0f} → "
        f"{1000 * length['tokens_after'] / length['characters']:.0f} on {length['data']}"
        for length in lengths
    )
    files = ", ".join(section.get("left_out_files", []))
    return (
        f"The vocabulary has {section['kept']:,} of {section['dense']:,} tokens: {chosen} {texts}, all that these are "
        "merged from, special and added tokens, and bytes and letters. Any other text, such as text in other "
        "languages, is still encoded, by bytes or smaller pieces, and so in longer sequences. Tokens per 1000 "
        f"characters: {grown}."
        + (f" Files that hold the whole vocabulary ({files}) are left out; tokenizer.json has all." if files else "")
    )


def neurons_text(neurons: int | list[int]) -> str:
    """Numbers of MLP neurons in words."""
    return str(neurons) if isinstance(neurons, int) else f"{min(neurons)} to {max(neurons)}"
