"""The custom class as other tools ask it: without its head, and by its config alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests import tiny
from tests.conftest import Slicer
from tests.results import load

CASES = [("opt", "global"), ("gpt_neox", "global"), ("llama", "per-block")]


@pytest.mark.parametrize(("case", "basis"), CASES)
def test_auto_model_is_the_model_without_its_head(case: str, basis: str, run_slice: Slicer) -> None:
    folder = run_slice(case, width=24, basis=basis).output
    loaded: Any = AutoModel.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"]
    whole = load(folder)
    ids = tiny.random_ids(2, 9)
    with torch.no_grad():
        hidden = model.eval()(ids).last_hidden_state
        assert torch.equal(whole.get_output_embeddings()(hidden), whole(ids).logits)


@pytest.mark.parametrize(("case", "basis"), CASES)
def test_the_config_answers_for_the_sliced_model(case: str, basis: str, run_slice: Slicer) -> None:
    """vLLM sizes the head by hidden_size, and caches by heads and head_dim."""
    config = AutoConfig.from_pretrained(run_slice(case, width=24, basis=basis).output)
    assert config.get_text_config() is config
    assert config.hidden_size == (24 if basis == "global" else tiny.WIDTH)
    assert (config.num_attention_heads, config.head_dim) == (4, tiny.WIDTH // 4)
    assert (config.num_hidden_layers, config.vocab_size) == (3, tiny.VOCABULARY)
    assert not hasattr(config, "no_such_field")


def test_resized_embeddings_survive_saving(run_slice: Slicer, tmp_path: Path) -> None:
    model = load(run_slice("opt", width=24).output)
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    model.save_pretrained(tmp_path / "resized")
    again = load(tmp_path / "resized")
    assert again.config.vocab_size == tiny.VOCABULARY + 8
    ids = tiny.random_ids(1, 6)
    with torch.no_grad():
        actual, expected = again(ids).logits, model(ids).logits
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()  # tensors may lie otherwise in memory
