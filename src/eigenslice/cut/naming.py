"""Names, and parts, under which a result's tensors are stored."""

import torch

from eigenslice.checkpoint.empty import empty_model
from eigenslice.checkpoint.mapping import as_stored
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import NamedTensors
from eigenslice.plan.layout import layout
from eigenslice.plan.plan import Plan
from eigenslice.plan.result_config import checked_config, stock_config


class StoredForm:
    """The map from transformers' names of tensors to the names in the result's files.

    A stock result's experts are taken apart, as on the hub: other runtimes read them so. The custom class wraps the
    dense architecture's model.
    """

    def __init__(self, anatomy: Anatomy, plan: Plan) -> None:
        config = checked_config(stock_config(anatomy, plan, torch.float32)) if plan.stock else None
        self._model = None if config is None else empty_model(config)
        announced = {name: torch.empty(shape, device="meta") for name, (_, shape) in layout(anatomy, plan).items()}
        self._same = self._model is not None and as_stored(self._model, announced).keys() == announced.keys()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self(announced.items())}
        """Shapes of all tensors in the result's files."""
        self.in_float32 = frozenset(name for name in self.shapes if anatomy.keeps_float32(name))
        """Names of tensors that transformers keeps in float32 beside 16-bit weights."""

    def __call__(self, tensors: NamedTensors) -> NamedTensors:
        """Tensors under their names in the files, one after the other."""
        for name, tensor in tensors:
            if self._model is None:
                yield f"model.{name}", tensor
            elif self._same:
                yield name, tensor
            else:
                yield from as_stored(self._model, {name: tensor}).items()
