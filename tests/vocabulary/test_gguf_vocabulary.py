"""A vocabulary that is cut on its way into a GGUF, and out of one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from eigenslice.export import export_model
from eigenslice.export.gguf.llama_cpp import LlamaCpp
from eigenslice.options.exporting import ExportOptions
from tests.vocabulary.conftest import TEXT, Dense, Run
from tests.vocabulary.kinds import OTHER, sentences


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_llama_cpp_reads_the_kept_tokens(kind: str, run: Run, tmp_path: Path) -> None:
    result, output = run("llama", kind), tmp_path / "result.gguf"
    export_model(ExportOptions(model=str(result.output), output=output, to="gguf", type="f32"))  # compares logits
    small = AutoTokenizer.from_pretrained(result.output)
    with LlamaCpp(output) as runtime:
        for text in (TEXT[:500], sentences(20, seed=9), OTHER):
            assert runtime.tokenize(text) == small(text)["input_ids"]


@pytest.mark.parametrize("case", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_gguf_is_cut_as_a_folder_is(kind: str, case: str, dense: Dense, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "dense.gguf"
    export_model(ExportOptions(model=str(dense(case, kind)), output=file, to="gguf", type="f32", check=False))
    result = run(model=str(file))
    full = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    small = AutoTokenizer.from_pretrained(result.output)
    assert len(small) < len(full)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    model = AutoModelForCausalLM.from_pretrained(result.output, dtype=torch.float32).eval()
    words = full.get_vocab()
    kept = torch.tensor([words[token] for token, _ in sorted(small.get_vocab().items(), key=lambda pair: pair[1])])
    old, new = (tokenizer(TEXT[:400], return_tensors="pt")["input_ids"] for tokenizer in (full, small))
    assert kept[new].equal(old)
    with torch.no_grad():
        expected, found = reference(old).logits[..., kept], model(new).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
