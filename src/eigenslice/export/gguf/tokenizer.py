"""The tokenizer of a GGUF, from a tokenizer of the `tokenizers` library.

llama.cpp has its own tokenizers, and a word (`tokenizer.ggml.pre`) for each way of splitting text. Its converter finds
the word by hashes of token ids. Here the word follows from the tokenizer's own rules of splitting. When the file is
written, a check compares llama.cpp's tokens (`agreement.py`).
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from eigenslice.errors import UnsupportedModelError

GPT2 = "ByteLevel"
"""ByteLevel's own split, which is GPT-2's."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LETTERS = r"[^\r\n\p{L}\p{N}]?"

SPLITS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    (CONTRACTIONS + r"|\p{N}{1,3}" + REST,): "llama-bpe",
    (CONTRACTIONS + r"|\p{N}" + REST,): "qwen2",
    (
        f"{LETTERS}{UPPER}*{LOWER}+|{LETTERS}{UPPER}+{LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
}
"""llama.cpp's word for the splits that a tokenizer makes, one after the other."""

BYTE_SCORE = -1e6
"""Score of tokens that no merge makes."""


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, vocabulary: int, eos: list[int], pre: str | None) -> None:
    """Write the tokenizer's tokens, merges, special tokens and chat template.

    Args:
        writer: Writer of the GGUF.
        tokenizer: transformers' tokenizer.
        vocabulary: Rows of the embedding; tokens that the tokenizer lacks are marked as unused.
        eos: The tokens that end a text; one after the first is the end of a turn.
        pre: llama.cpp's word for the way of splitting text; None finds it.

    Raises:
        UnsupportedModelError: a kind of tokenizer that llama.cpp doesn't have, or that has no known word.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec: dict[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    )
    model: dict[str, Any] = spec["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is of kind {model['type']}",
            allowed="BPE: of bytes (GPT-2, Llama 3, Qwen) or of pieces with bytes as fallback (Llama 2, Mistral)",
            next_step="convert the folder with llama.cpp's own convert_hf_to_gguf.py",
        )
    tokens: dict[str, int] = dict(model["vocab"])
    tokens |= {added["content"]: added["id"] for added in spec["added_tokens"] or ()}
    if max(tokens.values()) >= vocabulary:
        raise UnsupportedModelError(
            f"the tokenizer has token {max(tokens.values())}; the embedding has {vocabulary} rows",
            allowed="the model's own tokenizer",
            next_step="check the tokenizer files in the folder",
        )
    special = {added["id"]: added["special"] for added in spec["added_tokens"] or ()}
    unknown = tokens.get(model.get("unk_token") or "")
    names = [f"[PAD{i}]" for i in range(vocabulary)]
    kinds = [TokenType.UNUSED] * vocabulary
    for token, number in tokens.items():
        names[number] = token
        kinds[number] = _kind(token, number, unknown, special, model)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(names)
        writer.add_token_scores(_scores(names, merges))
        writer.add_add_space_prefix(_prefixes_space(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or split_name(spec["pre_tokenizer"]))
        writer.add_token_list(names)
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer, eos)


def _kind(token: str, number: int, unknown: int | None, special: dict[int, bool], model: dict[str, Any]) -> TokenType:
    if model.get("byte_fallback"):
        if number == unknown:
            return TokenType.UNKNOWN
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return TokenType.BYTE
    if number in special:
        return TokenType.CONTROL if special[number] else TokenType.USER_DEFINED
    return TokenType.NORMAL


def _scores(names: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's scores, of which only the order counts: the first merge is made first."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), number)
    return [-float(rank[name]) if name in rank else BYTE_SCORE for name in names]


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _prefixes_space(spec: dict[str, Any]) -> bool:
    """Return whether a space is put before a text, by the normalizer (older files) or by the splitting (newer
    files)."""
    if any(step["type"] == "Prepend" for step in _parts(spec["normalizer"], "normalizers")):
        return True
    steps = _parts(spec["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's word for a pre-tokenizer of the `tokenizers` library, as its JSON has it.

    Raises:
        UnsupportedModelError: no word is known.
    """
    splits: list[str] = []
    for step in _parts(pre_tokenizer, "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(next(iter(step["pattern"].values())))
        elif step["type"] == "Digits" and step["individual_digits"]:
            splits.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            splits += [GPT2] if step["use_regex"] else []
        else:
            splits.append(step["type"])
    word = SPLITS.get(tuple(splits))
    if word is None:
        raise UnsupportedModelError(
            f"no name of llama.cpp's is known for how this tokenizer splits text: {splits}",
            allowed="the splits of " + ", ".join(SPLITS.values()),
            next_step="name it with --tokenizer-pre, as in the tokenizer.ggml.pre of a GGUF of the dense model",
        )
    return word


def _write_special(writer: GGUFWriter, tokenizer: Any, eos: list[int]) -> None:
    for name in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if eos:
        writer.add_eos_token_id(eos[0])
    if len(eos) > 1:
        writer.add_eot_token_id(eos[1])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
