"""A tokenizer for tiny models: the word w17 is token 17, and other words are unknown."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY

UNKNOWN = 3
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": UNKNOWN}


def tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """transformers' tokenizer of this many words."""
    words = SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text(ids: list[int]) -> str:
    """Words that the tokenizer turns into these tokens."""
    return " ".join(f"w{i}" for i in ids)
