"""Tokenizers of each kind, trained on a few sentences, as transformers saves them."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NOUNS = [
    "river",
    "mountain",
    "village",
    "teacher",
    "garden",
    "window",
    "letter",
    "harbour",
    "machine",
    "forest",
    "candle",
    "island",
]
VERBS = [
    "carries",
    "watches",
    "follows",
    "repairs",
    "discovers",
    "remembers",
    "paints",
    "imagines",
    "crosses",
    "measures",
]
OTHER = "Äpfel und Öl kosten in Köln 12 €; мама мыла раму, 東京は日本の首都です 🎉\n\n\tdef f(x):\n        return x[1:]"
"""Text of other kinds than the sentences."""


def sentences(count: int, seed: int = 0, nouns: list[str] = NOUNS) -> str:
    """English sentences of a small vocabulary."""
    draw = random.Random(seed)
    return " ".join(
        f"The {draw.choice(nouns)} {draw.choice(VERBS)} the {draw.choice(nouns)}, then {draw.randrange(100)}."
        for _ in range(count)
    )


def _bytes(vocabulary: int, regex: str | None = None) -> Tokenizer:
    """BPE of bytes, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(300), OTHER * 5], trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    """BPE of bytes with GPT-2's split, and a template that puts <s> before a text."""
    tokenizer = _bytes(600)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def whole_words() -> Tokenizer:
    """BPE of bytes that takes a word of the vocabulary without merges, as Llama 3 does."""
    tokenizer = _bytes(600, r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
    tokenizer.model.ignore_merges = True  # type: ignore[attr-defined]
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE of pieces with bytes as fallback and no split at all, as Gemma has it; added tokens come last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # only so that training is quick
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["\u2581", "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(300), OTHER * 5], trainer)
    # Training made added tokens of the bytes; of theirs, checkpoints have special ones only
    model = models.BPE(tokenizer.get_vocab(), _merges(tokenizer), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    result = Tokenizer(model)
    result.normalizer = tokenizer.normalizer
    result.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    result.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    result.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<end_of_turn>", normalized=False)])
    return result


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def unigram(byte_fallback: bool = False) -> Tokenizer:
    """Unigram of pieces with scores, as XGLM has it."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator([sentences(300), OTHER * 5], trainer)
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        if byte_fallback
        else [decoders.Metaspace()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "whole-words": whole_words,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
    "unigram-bytes": lambda: unigram(byte_fallback=True),
}


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    """Save a tokenizer as transformers does."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder
