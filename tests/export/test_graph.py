"""The function that is exported is the model: with a past, with padding, with windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from eigenslice.errors import ExportError
from eigenslice.export import export_model, openvino
from eigenslice.export.graph import CachedModel, graph_of
from eigenslice.options.exporting import ExportOptions
from tests import tiny
from tests.conftest import Slicer
from tests.messages import check_message
from tests.results import load

CASES = ["llama", "mistral-window", "qwen2-window", "qwen3", "phi", "opt", "gpt_neox", "gemma2", "gemma3_text"]


@pytest.mark.parametrize("case", CASES)
def test_a_past_and_padding(case: str, run_slice: Slicer) -> None:
    """Ten tokens, then two, of two sequences of which one has four tokens of padding before it."""
    model = load(run_slice(case, width=24).output)
    ids = tiny.random_ids(2, 12, seed=4)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    graph = graph_of(model)
    past = [tensor[:, :, :0] for tensor in graph.arguments[3]]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        first, *past = graph.module(ids[:, :10], mask[:, :10], positions[:, :10], past)
        second, *past = graph.module(ids[:, 10:], mask, positions[:, 10:], past)
    actual = torch.cat([first, second], dim=1)
    assert (actual - expected)[mask.bool()].abs().max() <= 1e-5 * expected.abs().max()
    assert len(past) == len(graph.past) == len(graph.present)
    assert all(tensor.shape[2] == 12 for tensor in past)


def test_present_is_what_transformers_caches() -> None:
    model = tiny.CASES["llama"].build()
    ids = tiny.random_ids(1, 6)
    cache: Any = DynamicCache(config=model.config)
    past = [tensor[:1, :, :0] for tensor in graph_of(model).arguments[3]]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        _, *present = CachedModel(model)(ids, torch.ones_like(ids), torch.arange(6)[None], past)
    for i, layer in enumerate(cache.layers):
        assert torch.equal(present[2 * i], layer.keys)
        assert torch.equal(present[2 * i + 1], layer.values)


def test_what_cannot_be_traced_is_refused(run_slice: Slicer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM computes its biases from a mask of two dimensions."""
    monkeypatch.setattr(openvino, "require", lambda: None)  # tracing comes first
    folder = run_slice("bloom", width=24).output
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ExportError) as caught:
        export_model(ExportOptions(model=str(folder), output=tmp_path / "o", to="openvino", check=False))
    check_message(caught.value, "--to openvino can't hold this 'eigenslice' model (ValueError: too many values")
    assert set(tmp_path.rglob("*")) == before
