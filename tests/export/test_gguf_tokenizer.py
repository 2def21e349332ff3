"""Tokenizers with bytes as fallback, and ways of splitting text."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from eigenslice.errors import UnsupportedModelError
from eigenslice.export import export_model
from eigenslice.export.agreement import TEXTS
from eigenslice.export.gguf.llama_cpp import LlamaCpp
from eigenslice.export.gguf.tokenizer import split_name
from eigenslice.options.exporting import ExportOptions
from tests import tiny
from tests.export.models import CONFIG
from tests.messages import check_message

MERGES = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("i", "n"), ("▁", "i"), ("▁i", "n"), ("▁", "in"), ("o", "n")]
"""As in what is made from SentencePiece's files: a piece has a merge for each pair of pieces that it may come from."""


def pieces(prefix: bool) -> Any:
    """A tokenizer as Llama 2's: pieces, bytes as fallback, spaces as ▁."""
    singles = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *singles]
    tokens += dict.fromkeys("".join(pair) for pair in MERGES)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocabulary, MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    steps: Any = [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    inner.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteFallback()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_bytes_as_fallback(prefix: bool, tmp_path: Path) -> None:
    tokenizer = pieces(prefix)
    folder = tiny.save(tiny.tiny_model("llama", CONFIG | {"vocab_size": len(tokenizer) + 5}), tmp_path / "dense")
    tokenizer.save_pretrained(folder)
    output = tmp_path / "out.gguf"
    export_model(ExportOptions(model=str(folder), output=output, to="gguf", type="f32"))
    with LlamaCpp(output) as runtime:
        for text in (*TEXTS, "then in the in on a thin  one", "</s>in"):
            assert runtime.tokenize(text) == tokenizer(text)["input_ids"]


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        split_name({"type": "Whitespace"})
    check_message(caught.value, "how this tokenizer splits text: ['Whitespace']")
    assert "--tokenizer-pre" in caught.value.next_step


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.tiny_model("llama", tiny.LLAMA), tmp_path / "dense")
    tiny.save_tokenizer(folder)
    with pytest.raises(UnsupportedModelError) as caught:
        export_model(ExportOptions(model=str(folder), output=tmp_path / "o.gguf", to="gguf", check=False))
    check_message(caught.value, "the tokenizer is of kind WordLevel")
    assert not (tmp_path / "o.gguf").exists()


def test_a_sequence_of_one_step_is_that_step() -> None:
    described = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert split_name({"type": "Sequence", "pretokenizers": [described]}) == split_name(described) == "gpt-2"
