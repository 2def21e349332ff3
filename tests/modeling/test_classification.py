"""Custom results with a classification head: as transformers' own class on the same sliced model, saved as stock."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests import tiny
from tests.conftest import Slicer

HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification]


def _both(auto: Any, run_slice: Slicer) -> list[Any]:
    """The custom and the stock model, sliced alike, with the same head."""
    models = []
    for form in ("custom", "stock"):
        folder = run_slice("llama", width=24, form=form).output
        loaded = auto.from_pretrained(folder, num_labels=3, output_loading_info=True)
        model, loading = loaded
        assert {name.partition(".")[0] for name in loading["missing_keys"]} == {"score"}
        models.append(model.eval())
    models[0].score.load_state_dict(models[1].score.state_dict())
    return models


@pytest.mark.parametrize("auto", HEADS)
def test_logits_loss_and_gradients_are_those_of_transformers_own_class(auto: Any, run_slice: Slicer) -> None:
    custom, stock = _both(auto, run_slice)
    ids = tiny.random_ids(3, 9).clamp_min(3)
    mask = torch.ones_like(ids)
    for row, padding in ((1, slice(0, 4)), (2, slice(5, 9))):  # left and right
        ids[row, padding], mask[row, padding] = 0, 0
    labels = torch.tensor([2, 0, 1]) if auto is AutoModelForSequenceClassification else ids % 3
    outputs = [model(ids, attention_mask=mask, labels=labels) for model in (custom, stock)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(custom.score.weight.grad, stock.score.weight.grad)
    reader = "layers.1.mlp.up_proj.weight"
    actual = custom.get_parameter(f"model.model.{reader}").grad
    torch.testing.assert_close(actual, stock.get_parameter(f"model.{reader}").grad)


@pytest.mark.parametrize("case", ["opt", "gpt_neox", "gemma2"])
def test_other_families_train_with_recomputed_activations(case: str, run_slice: Slicer) -> None:
    folder = run_slice(case, width=24, form="custom").output
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    ids, labels = tiny.random_ids(2, 7).clamp_min(3), torch.tensor([1, 3])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.train()
    model.activation_checkpointing_enable()
    again = gradients()
    assert len(again) == len(plain) > len(model.get_input_embeddings().weight.shape)
    for checkpointed, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(checkpointed, expected)
