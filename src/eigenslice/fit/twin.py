"""The sliced model beside the dense one: each layer is fitted as the dense stream passes it.

A reader is fitted to the dense reader's output, from the sliced stream as it has become; a writer to the dense stream
after it, so that it also repairs the error before it. What it can't repair, the readers of its MLP's neurons are fitted
to, by a Gauss-Newton step (`neuronfit`). Nothing is trained: each layer is fitted once, by least squares, and their
ridges (but that step's) are chosen on tokens that were held out.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size, normalize
from eigenslice.algebra.refit import Tokens
from eigenslice.arch import Sublayer
from eigenslice.cut.blocks import Kept, SiteBasis, keep_units, turn_end
from eigenslice.data.batches import BESIDE_GROUP, HELD_OUT_GROUP
from eigenslice.fit.neuron_readers import Errors, Readers, fit_readers
from eigenslice.fit.ridges import RidgeFits
from eigenslice.model.dense import DenseModel, Tensors
from eigenslice.model.folding import FoldedBlock, is_inside
from eigenslice.plan.forms import custom_config
from eigenslice.plan.plan import Plan
from eigenslice.runtime.offload import Offload, OffloadedTensors
from eigenslice.runtime.ranks import Ranks
from eigenslice.runtime.run_state import Position
from eigenslice.stream.experts import Experts, WriterInputs
from eigenslice.stream.runner import BlockRunner, captured_inputs, has_experts
from eigenslice.stream.walk import Activations, Site

STEP_SHARES = (1.0, 0.5, 0.25, 0.0)
"""Of a Gauss-Newton step, which is right to first order only: the largest is taken that lets errors grow no larger."""


class SlicedTwin:
    """A sliced model in the making.

    At every site of the dense stream, in order, `arrive` fits what writes to it and `leave` what reads it.

    Attributes:
        streams: Its residual stream at the current site, one tensor (B, T, width) a batch.
        reading: After the last site: what a head that isn't tied reads, (D, width).
    """

    def __init__(
        self,
        dense: DenseModel,
        plan: Plan,
        basis: SiteBasis,
        kept: list[Kept],
        dtype: torch.dtype,
        write: Callable[[int, Tensors], None],
        *,
        groups: Collection[int],
        ridge: float | None = None,
        reader_stride: int = 0,
        offload: Offload | None = None,
        ranks: Ranks,
    ) -> None:
        """Nothing is computed yet.

        Args:
            dense: The dense model.
            plan: Widths.
            basis: That of all sites.
            kept: Neurons and heads to keep in each block that is kept.
            dtype: Of the forward pass.
            write: Takes the number of a sliced block and its weights when they are done.
            groups: Those of the sequences, of all ranks, that layers are fitted on; others run along.
            ridge: Of all fits; None chooses it by holding groups out in turn, if there are two or more.
            reader_stride: What MLP neurons read is fitted, too, behind their writer; the curvature is that of every so
                many tokens. 0 leaves it as it is.
            offload: Where activations live between sites; None is on the device.
            ranks: Whose tokens it is fitted on.
        """
        self._offload = offload or Offload("device", dense.device)
        self.streams = self._offload.tensors()
        self.reading: Tensor | None = None
        self._dense, self._basis, self._kept, self._write, self._tied = dense, basis, kept, write, plan.tied
        self._fit, self._reader_stride, self._ranks = RidgeFits(groups, ridge, ranks), reader_stride, ranks
        self._blocks = plan.blocks
        self._place = 0  # among them, of the one whose writers, the last ones that ran, have yet to be fitted
        config = custom_config(dense, replace(plan, stock=None), torch.float32)
        self._runner = BlockRunner(config, dense.table.layers, dense.device, dtype)
        self._sites = dense.table.sites(dense.config)
        self._block: Tensors = {}
        self._inputs: list[OffloadedTensors] = []  # of each writer of a site

    def content(self) -> dict[str, Any]:
        """Beside `streams`, all it needs to go on after `arrive` at the first site of a block; as JSON."""
        return self._fit.content()

    def restore(self, position: Position, name: str, content: dict[str, Any]) -> None:
        """Go on where `arrive` was done, with streams saved under a name."""
        position.restore(name, self.streams)
        self._fit.restore(content)

    def waits(self, site: Site) -> bool:
        """Whether nothing happens at a site, since the result is without its block.

        What writes to it is fitted to the stream behind that block, and so makes up for it.
        """
        return site.layer is not None and site.block not in self._blocks

    def arrive(self, site: Site) -> None:
        """Fit what writes to a site; a block is done when the stream arrives at the next one."""
        if self.waits(site):
            return
        if site.block == 0 and site.index == 0:
            for a in site.activations:
                self.streams.append(self._basis.embed(a.hidden))
        else:
            self._fit_writers(site)
        if site.index == 0 and site.block > 0:
            self._write(self._place, self._block)
            self._block = {}
            self._runner.release(self._layer)

    def error(self, site: Site) -> dict[str, float]:
        """How far the sliced stream is from the dense one at a site where `arrive` was called.

        Returns:
            `error`, the squared difference as a share of the dense stream's energy, what was cut included, and
            `energy_kept`, the share of that energy in the basis: means over held-out tokens, or over those that layers
            are fitted on (those beside the texts left out) if none are held out.
        """
        sums = torch.zeros(2, 3, dtype=torch.float64, device=self._basis.matrix.device)  # fitted on, held out
        for number, a in enumerate(site.activations):
            if a.group != BESIDE_GROUP:
                dense, kept = a.rows(a.hidden), a.rows(self._basis.embed(a.hidden)) / self._basis.scale
                wrong = (kept - a.rows(self.streams[number]) / self._basis.scale).square().sum(-1)
                size = dense.square().sum(-1) + dense.shape[-1] * site.eps
                share = kept.square().sum(-1) / size
                found = torch.stack([(wrong / size + 1 - share).sum(), share.sum(), share.new_tensor(len(share))])
                sums[int(a.group == HELD_OUT_GROUP)] += found
        fitted, held_out = self._ranks.sum(sums).tolist()
        wrong, share, count = held_out if held_out[-1] else fitted
        return {"error": wrong / count, "energy_kept": share / count}

    def leave(self, site: Site) -> None:
        """Let readers predict what was cut from what is kept, then run the site's sublayers up to their writers."""
        if self.waits(site):
            return
        if site.layer is None and self._tied:
            return  # the head reads what the embeddings' basis lets it read

        normed = site.folded is None or self._sites[site.index][0].norm

        def seen(stream: Tensor) -> Tensor:
            return normalize(stream, site.eps) if normed else stream

        def tokens(number: int, a: Activations) -> Tokens:
            return a.rows(seen(self.streams[number])), a.rows(seen(a.hidden))

        reading = self._fit("read", self._turn(site), site.activations, self._basis.reading, tokens)
        if site.folded is None:
            assert site.layer is None, "a twin needs the weights that the walk holds"
            self.reading = reading
        else:
            self._run(site, site.folded, reading)

    @property
    def _layer(self) -> Any:
        """The block that ran last."""
        return self._runner.layers[self._place]

    def _kwargs(self, a: Activations) -> dict[str, Any]:
        """What that block is called with beside the stream."""
        return a.kwargs[self._blocks[self._place]]

    def _turn(self, site: Site) -> int:
        """Number of a site, which says whose turn it is to be held out."""
        return site.block * len(self._sites) + site.index

    def _run(self, site: Site, folded: FoldedBlock, reading: Tensor) -> None:
        """Give a site's sublayers weights, and keep what their writers read."""
        self._place = self._blocks.index(site.block)
        layer, kept = self._layer, self._kept[self._place]
        for sublayer in self._sites[site.index]:
            inner = {name: folded[name] for name in folded if is_inside(name, sublayer.inner)}

            def turned(units: Kept, sublayer: Sublayer = sublayer, inner: Tensors = inner) -> Tensors:
                ends = keep_units(sublayer, folded, units)
                return {name: turn_end(sublayer, name, weight, reading, self._basis) for name, weight in ends} | inner

            fitted: Tensors = {}
            if sublayer.stacked and kept.neurons is not None and has_experts(layer, sublayer):
                fitted = self._fit_experts(site, sublayer, turned(replace(kept, neurons=None, shared=None)), kept)
            weights = turned(kept) | fitted
            self._runner.assign(layer, self._dense.as_modules(weights.items(), self._basis.width))
            self._block |= weights
        self._capture(site.activations, site.index, self._fitted_writers(site.index))

    def _capture(self, activations: list[Activations], index: int, writers: list[str]) -> None:
        """Keep what the writers of a site read, which have yet to be fitted, or without any what is written."""
        self._inputs = [self._offload.tensors() for _ in writers or [""]]
        for number, a in enumerate(activations):
            with captured_inputs(self._layer, writers, stop=True) as inputs:
                normalized = self._layer.normalize(index, self.streams[number])
                update = self._layer.update(index, normalized, **self._kwargs(a))
            for kept_inputs, captured in zip(self._inputs, [inputs[w] for w in writers] or [update], strict=True):
                kept_inputs.append(captured)

    def _fit_experts(self, site: Site, sublayer: Sublayer, whole: Tensors, kept: Kept) -> Tensors:
        """Let the writer of each expert make up for the neurons that it loses.

        Each is fitted, on the tokens that it is given, to what it writes with all of its neurons: which expert a token
        is given to isn't smooth, so that the error before them isn't repaired here.

        Args:
            site: The one before them.
            sublayer: Theirs.
            whole: The block's weights with all neurons; names relative to the layer, out x in. Used up.
            kept: Neurons that each one keeps, and shared ones.

        Returns:
            Weights of the writers.
        """
        assert kept.neurons is not None
        layer = self._layer
        self._runner.assign(layer, self._dense.as_modules(whole.items(), self._basis.width))
        name, shared = sublayer.weight(sublayer.neuron_writer), sublayer.shared_writer
        writers, beside = whole[name], whole[sublayer.weight(shared)] if shared else None
        whole.clear()  # it is large
        inputs = WriterInputs(Experts.of(self._dense.table, sublayer, layer), self._offload)
        for number, a in enumerate(site.activations):
            with captured_inputs(layer, sublayer.observed, stop=True) as seen:
                layer.update(site.index, layer.normalize(site.index, self.streams[number]), **self._kwargs(a))
            inputs.append(a, seen[sublayer.experts], seen[shared] if shared else None)

        def fit(writer: Tensor, neurons: Tensor, expert: int | None) -> Tensor:
            def tokens(number: int, a: Activations) -> Tokens:
                rows, stream = inputs.read(number, a, expert)
                rows = rows * inverse_size(stream, site.eps)
                return rows[:, neurons], rows @ writer.T.to(rows.dtype)

            return self._fit("experts", self._turn(site), site.activations, writer[:, neurons], tokens)

        pairs = zip(writers, kept.neurons, strict=True)
        result = {name: torch.stack([fit(writer, neurons, expert) for expert, (writer, neurons) in enumerate(pairs)])}
        if shared and beside is not None and kept.shared is not None:
            result[sublayer.weight(shared)] = fit(beside, kept.shared, None)
        inputs.clear()
        return result

    def _fitted_writers(self, index: int) -> list[str]:
        """The writers at a site of this block, or none if there are experts: those don't repair what is before them."""
        sublayers = self._sites[index]
        if any(name in self._block for s in sublayers for name in s.stacked):
            return []
        return [name for s in sublayers for name in s.writers if s.weight(name) in self._block]

    def _fit_writers(self, site: Site) -> None:
        """Fit what writes to a site so that the sliced stream becomes the dense one, in the basis."""
        before = (site.index - 1) % len(self._sites)
        sublayers, writers = self._sites[before], self._fitted_writers(before)
        layer = self._layer
        scale = layer.scale_behind(before)
        if not writers:
            for number, update in enumerate(self._inputs[0]):
                self.streams[number] = layer.pass_on(before, self.streams[number] + update)
            self._inputs[0].clear()
            return
        biases = [name for name in _names(writers, self._block) if name.endswith(".bias")]
        parts = [self._block[module + ".weight"] for module in writers]
        if biases:
            parts.append(torch.stack([self._block[name] for name in biases]).sum(0)[:, None])

        def tokens(number: int, a: Activations) -> Tokens:
            inputs = self._stacked(number, bool(biases))
            target = self._basis.embed(a.hidden)
            missing = (target if scale is None else target / scale) - self.streams[number]
            weight = inverse_size(a.rows(a.hidden), site.eps)
            return a.rows(inputs) * weight, a.rows(missing) * weight

        kind = "neurons" if any(sublayer.neurons for sublayer in sublayers) else "write"
        fitted = self._fit(kind, self._turn(site), site.activations, torch.cat(parts, dim=1), tokens)
        pieces = fitted.split([part.shape[1] for part in parts], dim=1)
        self._block |= {module + ".weight": piece for module, piece in zip(writers, pieces, strict=False)}
        if biases:
            # Together they are the fitted bias; the others stay as they are
            self._block[biases[0]] = self._block[biases[0]] + pieces[-1][:, 0] - parts[-1][:, 0]
        if self._reader_stride:
            for sublayer in sublayers:
                if sublayer.neurons and sublayer.neuron_writer in writers:
                    self._fit_readers(site, before, sublayer, fitted, tokens)
        for number in range(len(self.streams)):
            inputs = self._stacked(number, bool(biases))
            written = inputs @ fitted.T.to(inputs.dtype)
            self.streams[number] = layer.pass_on(before, self.streams[number] + written)
        for inputs in self._inputs:
            inputs.clear()

    def _fit_readers(
        self, site: Site, before: int, sublayer: Sublayer, fitted: Tensor, tokens: Callable[[int, Activations], Tokens]
    ) -> None:
        """Let an MLP's readers reach what its writer, as it has been fitted, can't; what writers read is kept anew.

        Args:
            site: The one behind it.
            before: Number of the site before it, in its block.
            sublayer: The MLP.
            fitted: Weights of all writers beside each other, and the bias.
            tokens: Gives what they read and what was missing before they wrote, weighted.
        """
        layer, writers = self._layer, self._fitted_writers(before)

        def left() -> Iterator[tuple[int, Activations, Tensor]]:
            for number, a in enumerate(site.activations):
                if a.group in self._fit.groups:
                    inputs, missing = tokens(number, a)
                    yield number, a, missing - inputs @ fitted.T.to(inputs.dtype)

        def batches() -> Iterator[Errors]:
            for number, a, missing in left():
                normalized = layer.normalize(before, self.streams[number])
                weight = inverse_size(a.rows(a.hidden), site.eps)
                yield Errors(a, normalized, self._kwargs(a), missing, weight)

        def error() -> float:
            squares = torch.zeros(1, dtype=torch.float64, device=fitted.device)
            for _, _, missing in left():
                squares += missing.square().sum()
            return float(self._ranks.decide(self._ranks.sum(squares)))

        names = tuple(name for name in sublayer.readers if sublayer.weight(name) in self._block)
        writer = self._block[sublayer.weight(sublayer.neuron_writer)]
        readers = Readers(layer, before, sublayer, names)
        found, most = fit_readers(readers, batches(), writer, self._offload, self._reader_stride, self._ranks)
        changes = {sublayer.weight(name): change for name, change in found.items()}
        weights = {name: self._block[name] for name in changes}
        for share in STEP_SHARES:
            changed = {name: weights[name] + share * change for name, change in changes.items()}
            self._runner.assign(layer, self._dense.as_modules(changed.items(), self._basis.width))
            self._block |= changed
            self._capture(site.activations, before, writers)
            if error() <= most:
                return

    def _stacked(self, number: int, bias: bool) -> Tensor:
        """Inputs of all writers of the site beside each other, and a one where there is a bias."""
        inputs = [of_writer[number] for of_writer in self._inputs]
        ones = [torch.ones_like(inputs[0][..., :1])] if bias else []
        return torch.cat([*inputs, *ones], dim=-1)


def _names(modules: list[str], tensors: Tensors) -> list[str]:
    """Names of the parameters of some linear layers."""
    return [name for module in modules for name in (module + ".weight", module + ".bias") if name in tensors]
