"""One decoder layer in canonical form: norms folded into their readers, writers centred behind LayerNorms."""

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from eigenslice.algebra.norms import centre_rows, centre_writer, fold_into_reader
from eigenslice.arch import Sublayer, Table
from eigenslice.errors import UnsupportedModelError
from eigenslice.runtime.device import moved


def carry(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight (..., out, width) that gives W n + b for n + 1, where n sums to zero."""
    rows = centre_rows(weight)
    return rows if bias is None else rows + bias[..., None] / weight.shape[-1]


def gain_of(table: Table, weight: Tensor) -> Tensor:
    """The gain (D,) of a norm with this weight."""
    return 1 + weight if table.gain == "1+w" else weight


def is_inside(name: str, modules: tuple[str, ...]) -> bool:
    """Return whether a parameter is one of these or in one of these modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


class FoldedBlock(Mapping[str, Tensor]):
    """Canonical weights of one decoder layer, out x in, in float64 on the device; names are relative to the layer.

    Each is folded when it is asked for, and not kept.
    """

    def __init__(
        self,
        table: Table,
        stored: Collection[str],
        load: Callable[[str], Tensor],
        device: torch.device,
        residual_scale: float = 1.0,
    ) -> None:
        """Prepare the layer; nothing is loaded yet.

        Args:
            table: The layer's architecture.
            stored: Names of all parameters of the layer.
            load: Function that gives a parameter, as its module holds it.
            device: The device of folding.
            residual_scale: The layer's factor of its sublayers' outputs.

        Raises:
            UnsupportedModelError: the table doesn't account for a parameter.
        """
        self._table, self._stored, self._load = table, frozenset(stored), load
        self._device, self._scale = device, residual_scale
        self._ends: dict[str, tuple[Sublayer, str]] = {}  # the sublayer and the end that a weight or bias belongs to
        inner: list[str] = []
        for sublayer in table.sublayers:
            shift = f"{sublayer.norm}.bias" in stored
            for name in sublayer.ends:
                weight, bias = sublayer.weight(name), sublayer.bias(name)
                if weight not in stored:
                    continue  # this layer is of another kind
                self._ends[weight] = sublayer, name
                if bias in stored or (shift and name in sublayer.readers):
                    self._ends[bias] = sublayer, name
            kept = (*sublayer.inner, *sublayer.normed_writers, sublayer.post_norm or "")
            inner += [name for name in stored if is_inside(name, kept)]
        self._names = list(dict.fromkeys([*self._ends, *inner]))
        norms = {f"{sublayer.norm}.{kind}" for sublayer in table.sublayers for kind in ("weight", "bias")}
        unknown = set(stored) - set(self._names) - norms
        if unknown:
            raise UnsupportedModelError(
                f"a decoder layer has parameters that the table of {table.model_type!r} doesn't know: "
                f"{sorted(unknown)}",
                allowed="layers of which every parameter is known to read or write the residual stream, or neither",
                next_step="report this model: the table has to be extended",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if any(sublayer.post_norm and name == sublayer.post_gain for sublayer in self._table.sublayers):
            return self._scale * gain_of(self._table, self._must(name))
        if name not in self._ends:
            return self._must(name)
        sublayer, end = self._ends[name]
        if end in sublayer.readers:
            return self._read(sublayer, end, name == sublayer.weight(end))
        tensor = self._must(name)
        tensor = tensor if self._scale == 1 else tensor * self._scale
        if self._table.norm == "rms":
            return tensor
        return centre_writer(tensor) if name == sublayer.weight(end) else centre_rows(tensor)

    def _raw(self, name: str) -> Tensor | None:
        """A parameter, out x in; None if the layer has none of this name."""
        if name not in self._stored:
            return None
        stored = self._load(name)
        tensor = moved(stored, self._device, torch.float64)
        return self._table.transpose({name: tensor.clone() if tensor is stored else tensor})[name]

    def _must(self, name: str) -> Tensor:
        tensor = self._raw(name)
        assert tensor is not None, name  # it is among the names
        return tensor

    def _read(self, sublayer: Sublayer, end: str, weight: bool) -> Tensor:
        """A reader's weight with the norm's gain in it, or its bias with the norm's shift in it."""
        if weight:
            gain = self._raw(f"{sublayer.norm}.weight")
            tensor = self._must(sublayer.weight(end))  # a copy: it may be multiplied in place
            return tensor if gain is None else tensor.mul_(gain_of(self._table, gain))
        bias, shift = self._raw(sublayer.bias(end)), self._raw(f"{sublayer.norm}.bias")
        if shift is not None:
            bias = fold_into_reader(self._must(sublayer.weight(end)), bias, None, shift)[1]
        assert bias is not None  # it is among the names
        return bias
