"""Names, and parts, under which a result's tensors are stored."""

import torch

from eigenslice.checkpoint.empty import empty_model
from eigenslice.checkpoint.mapping import as_stored
from eigenslice.model.dense import DenseModel, NamedTensors
from eigenslice.plan.forms import checked_config, stock_config
from eigenslice.plan.layout import layout
from eigenslice.plan.plan import Plan


class StoredForm:
    """Takes tensors from transformers' names to those in the result's files.

    A stock result's experts are taken apart, as on the hub: other runtimes read them so. The custom class wraps the
    dense architecture's model.
    """

    def __init__(self, dense: DenseModel, plan: Plan) -> None:
        self._model = empty_model(checked_config(stock_config(dense, plan, torch.float32))) if plan.stock else None
        announced = {name: torch.empty(shape, device="meta") for name, (_, shape) in layout(dense, plan).items()}
        self._same = self._model is not None and as_stored(self._model, announced).keys() == announced.keys()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self(announced.items())}
        """Of all tensors in the result's files."""
        self.in_float32 = frozenset(name for name in self.shapes if dense.keeps_float32(name))
        """Names of those that transformers keeps in float32 beside 16-bit weights."""

    def __call__(self, tensors: NamedTensors) -> NamedTensors:
        """Tensors under their names in the files, one after the other."""
        for name, tensor in tensors:
            if self._model is None:
                yield f"model.{name}", tensor
            elif self._same:
                yield name, tensor
            else:
                yield from as_stored(self._model, {name: tensor}).items()
