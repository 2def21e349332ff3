"""A result with fewer tokens against the dense model with all of them, by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenslice.errors import CalibrationError, OptionsError, UnsupportedModelError
from eigenslice.options.calibration_text import CalibrationOptions
from tests import tiny
from tests.vocabulary import kinds
from tests.vocabulary.conftest import PADDED, TEXT, Dense, Run

CASES = ["llama", "llama-tied", "gemma", "gpt2", "gpt2-untied", "phimoe", "qwen3_moe", "mixtral", "opt", "gemma3_text"]
"""Tied and separate embeddings, scaled embeddings, learned positions, a head with a bias, mixtures."""


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def kept_ids(full: Any, small: Any) -> torch.Tensor:
    """Dense id of each of the result's tokens, by the tokens themselves."""
    words = full.get_vocab()
    return torch.tensor([words[token] for token, _ in sorted(small.get_vocab().items(), key=lambda pair: pair[1])])


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_on_kept_tokens(case: str, kind: str, dense: Dense, run: Run) -> None:
    result = run(case, kind)
    (model, small), (reference, full) = load(result.output), load(dense(case, kind))
    kept = kept_ids(full, small)
    assert model.config.get_text_config().vocab_size == len(small) == len(kept) < len(full)
    assert model.get_input_embeddings().weight.shape[0] == len(kept)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == result.manifest["tied"]
    old, new = (tokenizer(TEXT[:600], return_tensors="pt")["input_ids"] for tokenizer in (full, small))
    assert kept[new].equal(old)
    with torch.no_grad():
        expected, found = reference(old).logits[..., kept], model(new).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_every_id_in_the_result_is_that_of_the_same_token(dense: Dense, run: Run) -> None:
    result = run("llama", "byte-fallback")
    folder = result.output
    (model, small), (reference, full) = load(folder), load(dense("llama", "byte-fallback"))
    tokens = full.convert_ids_to_tokens
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert small.convert_ids_to_tokens(getattr(model.config, name)) == tokens(getattr(reference.config, name))
    generation, before = model.generation_config, reference.generation_config
    assert small.convert_ids_to_tokens(generation.eos_token_id) == tokens(before.eos_token_id)
    suppressed = [token for token in tokens(before.suppress_tokens) if token in small.get_vocab()]
    assert small.convert_ids_to_tokens(generation.suppress_tokens or []) == suppressed
    assert small.all_special_tokens == full.all_special_tokens
    assert {str(token) for token in small.added_tokens_decoder.values()} == {
        str(token) for token in full.added_tokens_decoder.values()
    }
    assert small("<s>a<tool>")["input_ids"] == [small.get_vocab()[token] for token in ("<s>", "a", "<tool>")]


def test_files_that_hold_the_vocabulary_again_are_left_out(dense: Dense, run: Run, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    for file in dense("llama", "byte-level").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    beside = ["tokenizer.model", "merges.txt", "vocab.json", "added_tokens.json"]
    for name in beside[:2]:
        (source / name).write_text("old")
    (source / "vocab.json").write_text(json.dumps({"a": 0}))
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": 0}))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }} 300")
    (source / "LICENSE").write_text("free")
    result = run(model=str(source))
    names = {path.name for path in result.output.iterdir()}
    assert not names & {*beside}
    assert result.manifest["vocabulary"]["left_out_files"] == sorted(beside)
    assert (result.output / "chat_template.jinja").read_text() == "{{ messages[0].content }} 300"
    assert (result.output / "LICENSE").read_text() == "free"


def test_the_size_counts_against_all_tokens(dense: Dense, run: Run) -> None:
    whole = AutoModelForCausalLM.from_pretrained(dense("llama-tied", "byte-level")).num_parameters()
    result = run("llama-tied")
    sizes = result.manifest["parameters"]
    assert sizes["dense"] == whole == sum(sizes["dense_by_role"].values())
    rows = len(load(dense("llama-tied", "byte-level"))[1]) + PADDED - result.manifest["vocabulary"]["kept"]
    assert rows > PADDED
    assert sizes["stored"] == whole - rows * tiny.WIDTH
    assert result.manifest["plan"]["width"] == tiny.WIDTH


def test_less_of_the_rest_is_cut(run: Run) -> None:
    options: dict[str, Any] = {"keep": 0.75, "own_text": 0}
    with_all = run("llama-tied", vocabulary_from=(), **options)
    with_some = run("llama-tied", **options)
    for result in (with_all, with_some):
        assert 0.6 < result.manifest["parameters"]["kept"] <= 0.75
    blocks = [
        sum(r.manifest["parameters"]["by_role"][role] for role in ("mlp", "attention")) for r in (with_all, with_some)
    ]
    assert blocks[1] > blocks[0]


def test_all_passes_see_kept_tokens_only(dense: Dense, run: Run) -> None:
    """Own text, random tokens, beginnings, trials and the fit: an id that isn't kept would be out of range."""
    result = run("llama", keep=0.6, own_text=0.5, random_tokens=0.5)
    assert result.manifest["calibration"]["own_sequences"] == 8
    assert result.manifest["calibration"]["random_sequences"] == 8
    assert result.manifest["trials"]
    model, small = load(result.output)
    full = load(dense("llama", "byte-level"))[1]
    assert small.decode(small(kinds.OTHER)["input_ids"], skip_special_tokens=True) == kinds.OTHER
    assert len(small(kinds.OTHER)["input_ids"]) > len(full(kinds.OTHER)["input_ids"])
    with torch.no_grad():
        assert model(small(kinds.OTHER, return_tensors="pt")["input_ids"]).logits.isfinite().all()


def test_a_number_of_tokens_on_the_calibration_text(dense: Dense, run: Run) -> None:
    full = load(dense("llama", "byte-level"))[1]
    result = run(vocabulary=400, vocabulary_from=())
    small = load(result.output)[1]
    assert len(small) == 400
    section = result.manifest["vocabulary"]
    assert (section["kept"], section["dense"], section["chosen"]) == (400, len(full) + PADDED, "number")
    before, after = (len(tokenizer(TEXT)["input_ids"]) for tokenizer in (full, small))
    (length,) = section["lengths"]
    assert (length["characters"], length["tokens_before"], length["tokens_after"]) == (len(TEXT), before, after)


def test_the_manifest_tells_how_other_text_grows(dense: Dense, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(kinds.OTHER * 20)
    result = run(calibration=CalibrationOptions(data=str(other), samples=8, seqlen=32))
    full, small = load(dense("llama", "byte-level"))[1], load(result.output)[1]
    lengths = {length["data"]: length for length in result.manifest["vocabulary"]["lengths"]}
    for name, text in (("text.txt", TEXT), ("other.txt", other.read_text())):
        found = lengths[name]["tokens_before"], lengths[name]["tokens_after"]
        assert found == tuple(len(tokenizer(text)["input_ids"]) for tokenizer in (full, small))
    assert lengths["other.txt"]["tokens_after"] > lengths["other.txt"]["tokens_before"]
    card = (result.output / "README.md").read_text()
    assert f"| tokens in the vocabulary | {len(full) + PADDED:,} | {len(small):,} |" in card
    assert "text.txt" in card


def test_an_interrupted_run_goes_on_only_with_the_same_tokens(run: Run, tmp_path: Path) -> None:
    result = run()
    file = tmp_path / "text.txt"
    again = run(output=result.output, resume=True)
    assert again.manifest == result.manifest
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(TEXT)
    first = run(calibration=CalibrationOptions(data=str(calibration), samples=16, seqlen=32))
    file.write_text(TEXT + kinds.OTHER)
    with pytest.raises(OptionsError, match="vocabulary"):
        run(
            output=first.output,
            resume=True,
            calibration=CalibrationOptions(data=str(calibration), samples=16, seqlen=32),
        )


def test_token_ids_are_refused(run: Run, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"calibration": torch.zeros(4, 32, dtype=torch.long)}, ids)
    with pytest.raises(CalibrationError, match="holds token ids"):
        run(calibration=CalibrationOptions(data=str(ids)))
    with pytest.raises(CalibrationError, match="holds token ids"):
        run(vocabulary_from=str(ids))


def test_tokenizers_of_other_kinds_are_refused_before_anything_is_written(
    dense: Dense, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    for file in dense("llama", "byte-level").iterdir():
        if not file.name.startswith("tokenizer"):
            (source / file.name).write_bytes(file.read_bytes())
    tiny.save_tokenizer(source)  # of whole words
    with pytest.raises(UnsupportedModelError, match="kind WordLevel"):
        run(model=str(source), output=tmp_path / "result")
    assert not (tmp_path / "result").exists()
    assert not (tmp_path / "result.partial").exists()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(dense: Dense, run: Run, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    tiny.save(tiny.CASES["llama"].build(), source)
    kinds.save(kinds.byte_level(), source)
    with pytest.raises(UnsupportedModelError, match="the embedding has 96 rows"):
        run(model=str(source))
