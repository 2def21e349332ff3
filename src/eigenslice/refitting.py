"""The sliced model beside the dense one: each layer is fitted, in closed form, as the dense stream passes it.

A reader is fitted to the dense reader's output, from the sliced stream as it has become; a writer to the dense stream
after it, so that it also repairs the error before it. Only Gram matrices are kept. Nothing is trained: every fit is
one ridge regression, its ridge chosen on tokens that were held out.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eigenslice.algebra.covariance import normalize
from eigenslice.algebra.refit import DEFAULT_RIDGE, NormalEquations, RidgeChoice
from eigenslice.dense import DenseModel, Tensors, is_inside
from eigenslice.forms import custom_config
from eigenslice.plan import Plan
from eigenslice.stream import RANDOM_GROUP, Activations, BlockRunner, Site, captured_inputs
from eigenslice.transform import SiteBasis, keep_neurons, read_ends, write_ends

FloatTensors = list[Tensor]


class SlicedTwin:
    """A sliced model in the making.

    `step` is to be called at every site of the dense stream, in order.

    Attributes:
        streams: Its residual stream at the current site, one tensor (B, T, width) a batch.
        reading: After the last step: what a head that isn't tied reads, (D, width).
    """

    def __init__(
        self,
        dense: DenseModel,
        plan: Plan,
        basis: SiteBasis,
        kept: list[Tensor | None],
        dtype: torch.dtype,
        write: Callable[[int, Tensors], None],
        trial: frozenset[int] = frozenset(),
    ) -> None:
        """Nothing is computed yet.

        Args:
            dense: The dense model.
            plan: Widths.
            basis: That of all sites.
            kept: MLP neurons to keep in each block; None keeps all.
            dtype: Of the forward pass.
            write: Takes the number of a block and its weights when they are done.
            trial: Groups of sequences that run along and that nothing is fitted on.
        """
        self.streams: FloatTensors = []
        self.reading: Tensor | None = None
        self._dense, self._basis, self._kept, self._write, self._trial = dense, basis, kept, write, trial
        config = custom_config(dense, replace(plan, stock=None), torch.float32)
        self._runner = BlockRunner(config, dense.table.layers, dense.device, dtype)
        self._sites = dense.table.sites(dense.config)
        self._number = 0
        self._block: Tensors = {}
        self._inputs: list[FloatTensors] = []
        self._choices = {kind: RidgeChoice() for kind in ("read", "write", "neurons")}

    def step(self, site: Site) -> None:
        """Go on to the next site: fit what writes to it, then what reads it."""
        if self._number == 0:
            self.streams = [self._basis.embed(a.hidden) for a in site.activations]
        else:
            self._fit_writers(site)
        if site.index == 0 and site.block > 0:
            self._write(site.block - 1, self._block)
            self._runner.release(self._runner.layers[site.block - 1])
        if site.index == 0:
            self._block = dict(site.folded or {})
        self._fit_readers(site)
        self._number += 1

    def _fit(
        self, kind: str, site: Site, base: Tensor, tokens: Callable[[int, Activations], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Ridge regression towards `base` (m, n); tokens gives a batch's inputs (T, n) and outputs (T, m).

        Groups take turns in being held out, to choose the ridge; the fit itself then has all tokens.
        """
        groups = sorted({a.group for a in site.activations} - self._trial - {RANDOM_GROUP})
        held_out = groups[self._number % len(groups)]
        sums = {held: NormalEquations.zeros(base.shape[1], base.shape[0], base.device) for held in (True, False)}
        for number, a in enumerate(site.activations):
            if a.group not in self._trial:
                sums[a.group == held_out].add(*tokens(number, a))
        ridge = self._choices[kind].choose(sums[False], sums[True], base) if len(groups) > 1 else DEFAULT_RIDGE
        return (sums[True] + sums[False]).solve(base, ridge)

    def _fit_readers(self, site: Site) -> None:
        """Let readers predict what was cut from what is kept, then run the site's sublayers up to their writers."""

        normed = site.folded is None or self._sites[site.index][0].norm

        def seen(stream: Tensor) -> Tensor:
            return normalize(stream, site.eps) if normed else stream

        def tokens(number: int, a: Activations) -> tuple[Tensor, Tensor]:
            return a.rows(seen(self.streams[number])), a.rows(seen(a.hidden))

        reading = self._fit("read", site, self._basis.reading, tokens)
        if site.folded is None:
            self.reading = reading
            return
        layer = self._runner.layers[site.block]
        for sublayer in self._sites[site.index]:
            weights = keep_neurons(sublayer, site.folded, self._kept[site.block] if sublayer.neurons else None)
            weights |= read_ends(sublayer, weights, reading) | write_ends(sublayer, weights, self._basis)
            self._block |= weights
            weights |= {name: w for name, w in site.folded.items() if is_inside(name, sublayer.inner)}
            self._runner.assign(layer, self._dense.as_modules(weights, self._basis.width))
        writers = self._fitted_writers(site.index)
        self._inputs = []
        for number, a in enumerate(site.activations):
            with captured_inputs(layer, writers) as inputs:
                normalized = layer.normalize(site.index, self.streams[number])
                update = layer.update(site.index, normalized, **a.kwargs[site.block])
            self._inputs.append([inputs[module] for module in writers] if writers else [update])

    def _fitted_writers(self, index: int) -> list[str]:
        """The writers at a site of this block, or none if there are experts: those stay as they were rotated."""
        sublayers = self._sites[index]
        if any(name in self._block for s in sublayers for name in s.stacked):
            return []
        return [name for s in sublayers for name in s.writers if s.weight(name) in self._block]

    def _fit_writers(self, site: Site) -> None:
        """Fit what writes to a site so that the sliced stream becomes the dense one, in the basis."""
        index = (self._number - 1) % len(self._sites)
        sublayers, writers = self._sites[index], self._fitted_writers(index)
        if not writers:
            for number, (update,) in enumerate(self._inputs):
                self.streams[number] = self.streams[number] + update
            return
        biases = [name for name in _names(writers, self._block) if name.endswith(".bias")]
        parts = [self._block[module + ".weight"] for module in writers]
        if biases:
            parts.append(torch.stack([self._block[name] for name in biases]).sum(0)[:, None])

        def tokens(number: int, a: Activations) -> tuple[Tensor, Tensor]:
            inputs = self._stacked(number, bool(biases))
            missing = self._basis.embed(a.hidden) - self.streams[number]
            # The next norm divides by the stream's size: an error counts by its share of it
            weight = torch.rsqrt(a.rows(a.hidden).square().mean(-1, keepdim=True) + site.eps)
            return a.rows(inputs) * weight, a.rows(missing) * weight

        kind = "neurons" if any(sublayer.neurons for sublayer in sublayers) else "write"
        fitted = self._fit(kind, site, torch.cat(parts, dim=1), tokens)
        for number in range(len(self.streams)):
            inputs = self._stacked(number, bool(biases))
            self.streams[number] = self.streams[number] + inputs @ fitted.T.to(inputs.dtype)
        pieces = fitted.split([part.shape[1] for part in parts], dim=1)
        self._block |= {module + ".weight": piece for module, piece in zip(writers, pieces, strict=False)}
        if biases:
            # Together they are the fitted bias; the others stay as they are
            self._block[biases[0]] = self._block[biases[0]] + pieces[-1][:, 0] - parts[-1][:, 0]

    def _stacked(self, number: int, bias: bool) -> Tensor:
        """Inputs of all writers of the site beside each other, and a one where there is a bias."""
        inputs = self._inputs[number]
        ones = [torch.ones_like(inputs[0][..., :1])] if bias else []
        return torch.cat([*inputs, *ones], dim=-1)


def _names(modules: tuple[str, ...] | list[str], tensors: Tensors) -> list[str]:
    """Names of the parameters of some linear layers."""
    return [name for module in modules for name in (module + ".weight", module + ".bias") if name in tensors]
