"""Published ways to make a model smaller without training, rebuilt minimally for Llama-like models.

All work block by block on transformers' own model in float32, see the calibration tokens of the other methods, and
store as many parameters as asked for. Their ratios and shapes are chosen in `sizes.py`; `parts.py` cuts. Attention is
cut in key/value heads with their query heads. A method whose name ends in "-mlp" cuts MLP neurons only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from eigenslice.data.batches import Batch
from rivals import flap, refit, slimgpt, wanda

Rival = Callable[[Any, list[Batch], int], Any]
"""From a dense model, calibration tokens and the most parameters allowed to a smaller model."""
RIVALS: dict[str, Rival] = {
    "random-neurons": partial(refit.prune, scores=refit.random_scores),
    "energy-neurons": partial(refit.prune, scores=refit.energy),
    "modegpt-mlp": partial(refit.prune, scores=refit.leverage),
    "slimgpt": partial(slimgpt.prune, heads=True),
    "slimgpt-mlp": partial(slimgpt.prune, heads=False),
    "flap": partial(flap.prune, heads=True),
    "flap-mlp": partial(flap.prune, heads=False),
    "wanda-sp": partial(wanda.prune, heads=True),
    "wanda-sp-mlp": partial(wanda.prune, heads=False),
}
"""The methods by the names that quality.py takes."""
