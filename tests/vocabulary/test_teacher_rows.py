"""The dense model as the teacher of a result with fewer tokens."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenslice.errors import OptionsError
from eigenslice.finetune import FinetuneOptions, finetune
from eigenslice.options.calibration_text import CalibrationOptions
from eigenslice.vocabulary import keep_rows, kept_ids
from tests.vocabulary import kinds
from tests.vocabulary.conftest import TEXT, Dense, Run


@pytest.mark.parametrize("case", ["llama", "llama-tied", "phimoe", "gemma"])
def test_a_model_with_kept_rows_gives_the_logits_of_kept_tokens(case: str, dense: Dense) -> None:
    folder, kept = dense(case, "byte-level"), (0, 1, 2, 3, 40, 41, 300, 310)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    keep_rows(model, kept)
    ids = torch.tensor([[1, 7, 4, 5, 6, 3]])
    with torch.no_grad():
        expected, found = reference(torch.tensor(kept)[ids]).logits[..., list(kept)], model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == len(kept)


def test_the_dense_model_teaches_by_its_kept_tokens(dense: Dense, run: Run, tmp_path: Path) -> None:
    result, text = run("llama", keep=0.6, own_text=0), tmp_path / "train.txt"
    text.write_text(TEXT * 3)
    options = FinetuneOptions(
        model=str(result.output),
        output=tmp_path / "tuned",
        teacher=str(dense("llama", "byte-level")),
        data=CalibrationOptions(data=str(text), samples=16, seqlen=32),
        held_out=4,
        device="cpu",
        rank=2,
        learning_rate=1e-2,
    )
    tuned = finetune(options)
    assert tuned.after.loss < tuned.before.loss
    assert tuned.manifest["vocabulary"] == result.manifest["vocabulary"]
    with pytest.raises(OptionsError, match="vocabulary of"):
        finetune(
            options.model_copy(update={"output": tmp_path / "other", "teacher": str(dense("llama", "byte-fallback"))})
        )


def test_ids_of_kept_tokens_by_the_tokens(run: Run, dense: Dense, tmp_path: Path) -> None:
    result = run("llama")
    full, small = (AutoTokenizer.from_pretrained(path) for path in (dense("llama", "byte-level"), result.output))
    kept = kept_ids(full, small)
    assert kept is not None
    assert full.convert_ids_to_tokens(list(kept)) == small.convert_ids_to_tokens(range(len(small)))
    other = AutoTokenizer.from_pretrained(kinds.save(kinds.unigram(), tmp_path / "other"))
    assert kept_ids(other, small) is None
