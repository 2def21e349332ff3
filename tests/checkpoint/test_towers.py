"""The language model of a checkpoint that reads images, too, is sliced alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from eigenslice.checkpoint.loading import load_model
from eigenslice.checkpoint.source import open_source
from eigenslice.checkpoint.towers import TOWERS
from eigenslice.errors import EigensliceWarning, UnsupportedModelError
from eigenslice.model.dense import DenseModel
from eigenslice.slicing.memory import whole_bytes
from tests import tiny
from tests.conftest import Slicer
from tests.messages import check_message
from tests.results import load, stored_tensors

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8, "projection_dim": 16, "head_dim": 8}
LLAMA = {"model_type": "llama"} | tiny.LLAMA
TEXTS: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text"} | tiny.CASES["gemma3_text"].config | tiny.CASES["gemma3_text"].extra,
    "gemma4": {"model_type": "gemma4_text"} | tiny.CASES["gemma4_text"].config | tiny.CASES["gemma4_text"].extra,
    "internvl": {"model_type": "qwen3", "head_dim": 8} | tiny.LLAMA,
    "llava_onevision": {"model_type": "qwen2"} | tiny.LLAMA,
    "mistral3": {"model_type": "mistral", "head_dim": 8, "sliding_window": None} | tiny.LLAMA,
}
"""Language models that are no Llama."""
IMAGE = 5


def whole_config(model_type: str, **values: Any) -> Any:
    """Config of a tiny model of images and text."""
    usual = AutoConfig.for_model(model_type).vision_config
    text = TEXTS.get(model_type, LLAMA)
    vision = VISION | {"model_type": usual.model_type if usual else f"{model_type}_vision"}
    if model_type == "internvl":  # its sizes are pairs
        vision |= {"image_size": [16, 16], "patch_size": [8, 8]}
    extra: dict[str, Any] = {
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        "image_seq_length": 4,
        "mm_tokens_per_image": 4,
    }
    ties = text.get("tie_word_embeddings", True)
    return AutoConfig.for_model(
        model_type, text_config=dict(text), vision_config=vision, **({"tie_word_embeddings": ties} | extra | values)
    )


def save(model_type: str, folder: Path, **values: Any) -> Path:
    torch.manual_seed(0)
    return tiny.save(
        tiny.randomized(AutoModelForImageTextToText.from_config(whole_config(model_type, **values))), folder
    )


@pytest.mark.parametrize("model_type", TOWERS)
def test_full_width_gives_the_whole_models_logits_of_text(model_type: str, run_slice: Slicer, tmp_path: Path) -> None:
    folder = save(model_type, tmp_path / "whole")
    with pytest.warns(EigensliceWarning, match=f"is a '{model_type}' model: its language model"):
        result = run_slice("llama", model=str(folder), width=tiny.WIDTH)
    ids = tiny.random_ids(2, 20, seed=5)
    ids[ids == IMAGE] += 1  # text has no place for an image
    with torch.no_grad():
        expected = load_model(str(folder)).model(input_ids=ids).logits
        actual = load(result.output)(ids).logits
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any("vision" in name for name in stored_tensors(result.output))
    assert result.manifest["form"] == "stock"


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_models_config_says_whether_embeddings_are_tied(tied: bool, tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "whole", tie_word_embeddings=tied)
    with pytest.warns(EigensliceWarning):
        dense = DenseModel(open_source(str(folder)))
    assert dense.anatomy.tied == tied
    text = load_model(str(folder)).model.model.language_model
    head = 0 if tied else tiny.VOCABULARY * tiny.WIDTH
    assert dense.anatomy.parameters == sum(parameter.numel() for parameter in text.parameters()) + head


def test_memory_to_write_text_counts_what_reads_images(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "whole")
    with pytest.warns(EigensliceWarning):
        dense = DenseModel(open_source(str(folder)))
    loaded = load_model(str(folder)).model
    assert whole_bytes(dense, torch.bfloat16) == 2 * sum(parameter.numel() for parameter in loaded.parameters())


def test_a_language_model_without_a_table_is_refused(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "whole")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    with pytest.raises(UnsupportedModelError) as caught:
        open_source(str(folder))
    check_message(caught.value, "model_type 'llava' reads images beside text, and its language model isn't known")
