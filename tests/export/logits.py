"""A runtime's logits beside transformers', for models of two layers: tracing takes seconds a layer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eigenslice.export import export_model
from eigenslice.options.exporting import ExportOptions
from tests import tiny
from tests.results import load


def save_two_layers(case: str, folder: Path) -> Path:
    """A case's dense model with two layers; of those that have windows, the first has one."""
    values: dict[str, Any] = {"num_hidden_layers": 2}
    if case.startswith("gemma"):
        values |= {"layer_types": ["sliding_attention", "full_attention"]}
    chosen = tiny.CASES[case]
    return tiny.save(replace(chosen, extra=chosen.extra | values).build(), folder)


def assert_same_logits(
    folder: Path, output: Path, to: Literal["openvino", "onnx"], runtime: Callable[[Path], Any]
) -> None:
    """What a runtime computes from an export, 12 tokens at once and one by one, is what transformers computes."""
    export_model(ExportOptions(model=str(folder), output=output, to=to, check=False))
    ids = tiny.random_ids(1, 12)
    with torch.no_grad():
        expected = load(folder)(ids).logits[0]
    running, prompt = runtime(output), ids[0].tolist()
    whole = torch.tensor(np.array(running.logits(prompt)))
    steps = torch.cat([torch.tensor(np.array(running.logits(prompt[: i + 1]))) for i in range(12)])
    for actual in (whole, steps):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
