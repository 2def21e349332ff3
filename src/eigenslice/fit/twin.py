"""The sliced model beside the dense one: each layer is fitted as the dense stream passes it.

A reader is fitted to the dense reader's output, from the sliced stream as it has become. A writer is fitted to the
dense stream after it, so that the writer also repairs the error before it. The readers of its MLP's neurons are fitted
to the error that the writer can't repair, by a Gauss-Newton step (`neuron_readers`). Nothing is trained: each layer is
fitted once, by least squares. Ridges, but that step's, are chosen on tokens that were held out.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.covariance import inverse_size, normalize
from eigenslice.algebra.refit import InputsOutputs
from eigenslice.arch import Sublayer
from eigenslice.cut.blocks import Kept, keep_units, rotate_end
from eigenslice.cut.ends import GlobalCut
from eigenslice.fit.expert_writers import InputsOutputsOf, fit_experts
from eigenslice.fit.neuron_readers import Errors, Readers, fit_readers, take_largest_step
from eigenslice.fit.normed_writers import NormedWriter
from eigenslice.fit.ridges import Fitting, RidgeFits
from eigenslice.model.dense import Tensors
from eigenslice.model.folding import FoldedBlock, is_inside
from eigenslice.plan.forms import custom_config
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.run_state import Position
from eigenslice.stream.experts import Experts, WriterInputs
from eigenslice.stream.run import Run
from eigenslice.stream.runner import BlockRunner, captured_inputs, has_experts
from eigenslice.stream.walk import Activations, Site


class SlicedTwin:
    """A sliced model in the making, which `run_beside` runs beside the dense one.

    Attributes:
        streams: The residual stream at the current site, one tensor (B, T, width) a batch; from the first site on.
        reading: After the last site, an untied head's map from the sliced stream to dense coordinates, (D, width).
    """

    streams: OffloadedTensors

    def __init__(self, run: Run, cut: GlobalCut, fitting: Fitting, write: Callable[[int, Tensors], None]) -> None:
        """Prepare the twin; nothing is computed yet.

        Args:
            run: The run.
            cut: Widths, basis, and the kept parts of each block.
            fitting: Options of the fits.
            write: Function that takes the number of a sliced block and its weights when the block is done.
        """
        self.reading: Tensor | None = None
        self._run, self._dense, self._write = run, run.dense, write
        self._plan, self._basis, self._kept = cut.plan, cut.basis.site, cut.kept
        self._ridges = RidgeFits(fitting, run.ranks)
        self._reader_stride = fitting.reader_stride
        self._place = 0  # number in the result of the block that ran last; its last writers have yet to be fitted
        config = custom_config(run.dense.anatomy, replace(cut.plan, stock=None), torch.float32)
        self._runner = BlockRunner(config, run.dense.table.layers, run.dense.device, run.dtype)
        self._sites = run.dense.anatomy.sites
        self._block: Tensors = {}
        self._inputs: list[OffloadedTensors] = []  # of each writer of a site
        self._scale: Tensor | None = None  # of the stream behind the sublayers that ran last
        self._normed: NormedWriter

    def content(self) -> dict[str, Any]:
        """Return all that `restore` needs beside the streams, once the writers before a block are fitted; as JSON."""
        return self._ridges.content()

    def restore(self, position: Position, name: str, content: dict[str, Any]) -> None:
        """Go on at a saved position, where the writers before it are fitted.

        Args:
            position: The position.
            name: Name of the streams there.
            content: The answer of `content` then.
        """
        self.streams = self._run.offload.tensors()
        position.restore(name, self.streams)
        self._ridges.restore(content)

    def is_dropped_at(self, site: Site) -> bool:
        """Return whether the result is without a site's block, so that nothing happens there.

        The writers before the site are fitted to the stream behind that block, and so make up for it.
        """
        return site.layer is not None and site.block not in self._plan.kept_blocks

    def fit_writers_before(self, site: Site) -> None:
        """Fit the writers before a site. A block is done when the stream arrives at the next block."""
        if self.is_dropped_at(site):
            return
        if site.block == 0 and site.index == 0:
            self.streams = self._run.offload.tensors()
            for batch in site.activations:
                self.streams.append(self._basis.embed(batch.hidden))
        else:
            self._fit_writers(site)
        if site.index == 0 and site.block > 0:
            self._write(self._place, self._block)
            self._block = {}
            self._runner.release(self._layer)

    def fit_readers_at(self, site: Site) -> None:
        """Let readers predict the cut part of the stream from the kept part, and run the sublayers up to their
        writers."""
        if self.is_dropped_at(site):
            return
        if site.layer is None and self._plan.tied:
            return  # the basis of the embeddings decides the input of the head

        normed = site.folded is None or self._sites[site.index][0].norm

        def seen(stream: Tensor) -> Tensor:
            return normalize(stream, site.eps) if normed else stream

        def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
            return batch.rows(seen(self.streams[number])), batch.rows(seen(batch.hidden))

        reading = self._ridges.fit(
            "read", self._site_number(site), site.activations, self._basis.reading, inputs_outputs
        )
        if site.folded is None:
            assert site.layer is None, "a twin needs the weights that the walk holds"
            self.reading = reading
        else:
            self._run_sublayers(site, site.folded, reading)

    @property
    def _layer(self) -> Any:
        """The block that ran last."""
        return self._runner.layers[self._place]

    def _kwargs(self, batch: Activations) -> dict[str, Any]:
        """Return the arguments of this block beside the stream."""
        return batch.kwargs[self._plan.kept_blocks[self._place]]

    def _site_number(self, site: Site) -> int:
        """Return the number of a site, which says which group is held out."""
        return site.block * len(self._sites) + site.index

    def _run_sublayers(self, site: Site, folded: FoldedBlock, reading: Tensor) -> None:
        """Give a site's sublayers weights, and keep the inputs of their writers."""
        self._place = self._plan.kept_blocks.index(site.block)
        layer, kept = self._layer, self._kept[self._place]
        for sublayer in self._sites[site.index]:
            inner = {name: folded[name] for name in folded if is_inside(name, sublayer.inner)}

            def rotated_weights(units: Kept, sublayer: Sublayer = sublayer, inner: Tensors = inner) -> Tensors:
                ends = keep_units(sublayer, folded, units)
                return dict(rotate_end(sublayer, name, weight, reading, self._basis) for name, weight in ends) | inner

            fitted: Tensors = {}
            if sublayer.stacked and kept.neurons is not None and has_experts(layer, sublayer):
                fitted = self._fit_experts(
                    site, sublayer, rotated_weights(replace(kept, neurons=None, shared_neurons=None)), kept
                )
            weights = rotated_weights(kept) | fitted
            if sublayer.post_norm:
                self._normed = NormedWriter(folded[sublayer.post_gain], self._basis, site.eps)
            self._runner.assign(layer, self._dense.as_modules(weights.items(), self._basis.width))
            self._block |= weights
        self._capture(site.activations, site.index, self._fitted_writers(site.index))

    def _capture(self, activations: list[Activations], index: int, writers: list[str]) -> None:
        """Keep the inputs of a site's writers that have yet to be fitted. Without such writers, keep their output."""
        self._inputs = [self._run.offload.tensors() for _ in writers or [""]]
        for number, batch in enumerate(activations):
            with captured_inputs(self._layer, writers, stop=True) as inputs:
                normalized = self._layer.normalize(index, self.streams[number])
                update = self._layer.update(index, normalized, **self._kwargs(batch))
            for kept_inputs, captured in zip(self._inputs, [inputs[w] for w in writers] or [update], strict=True):
                kept_inputs.append(captured)

    def _fit_experts(self, site: Site, sublayer: Sublayer, whole: Tensors, kept: Kept) -> Tensors:
        """Fit the writers of experts, and return their weights.

        Args:
            site: The site before the experts.
            sublayer: The experts.
            whole: The block's weights with all neurons, out x in; names relative to the layer. The dictionary is
                emptied.
            kept: Neurons that each expert keeps, and kept neurons of shared experts.
        """
        layer = self._layer
        self._runner.assign(layer, self._dense.as_modules(whole.items(), self._basis.width))
        shared = sublayer.shared_writer
        names = [sublayer.weight(name) for name in (sublayer.neuron_writer, shared) if name]
        writers = {name: whole[name] for name in names}
        whole.clear()  # it is large
        inputs = WriterInputs(Experts.of(self._dense.table, sublayer, layer), self._run.offload)
        for number, batch in enumerate(site.activations):
            with captured_inputs(layer, sublayer.observed, stop=True) as seen:
                layer.update(site.index, layer.normalize(site.index, self.streams[number]), **self._kwargs(batch))
            inputs.append(batch, seen[sublayer.experts], seen[shared] if shared else None)
        regression = partial(self._ridges.fit, "experts", self._site_number(site), site.activations)
        fitted = fit_experts(site, sublayer, writers, kept, inputs, regression)
        inputs.clear()
        return fitted

    def _fitted_writers(self, index: int) -> list[str]:
        """Return the writers at a site of this block; none for experts, which don't repair the error before them."""
        sublayers = self._sites[index]
        if any(name in self._block for s in sublayers for name in s.stacked):
            return []
        return [name for s in sublayers for name in (*s.writers, *s.normed_writers) if s.weight(name) in self._block]

    def _fit_writers(self, site: Site) -> None:
        """Fit the writers before a site so that the sliced stream becomes the dense stream in the basis."""
        before = (site.index - 1) % len(self._sites)
        sublayers, writers = self._sites[before], self._fitted_writers(before)
        layer = self._layer
        self._scale = layer.scale_behind(before)
        if not writers:
            for number, update in enumerate(self._inputs[0]):
                self.streams[number] = layer.pass_on(before, self.streams[number] + update)
            self._inputs[0].clear()
            return
        if sublayers[0].post_norm:
            self._fit_normed_writer(site, before, sublayers[0])
            return
        biases = [name for name in _names(writers, self._block) if name.endswith(".bias")]
        parts = [self._block[module + ".weight"] for module in writers]
        if biases:
            parts.append(torch.stack([self._block[name] for name in biases]).sum(0)[:, None])

        def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
            inputs = self._stacked(number, bias=bool(biases))
            weight = inverse_size(batch.rows(batch.hidden), site.eps)
            return batch.rows(inputs) * weight, batch.rows(self._missing(number, batch)) * weight

        kind = "neurons" if any(sublayer.can_cut_neurons for sublayer in sublayers) else "write"
        fitted = self._ridges.fit(
            kind, self._site_number(site), site.activations, torch.cat(parts, dim=1), inputs_outputs
        )
        pieces = fitted.split([part.shape[1] for part in parts], dim=1)
        self._block |= {module + ".weight": piece for module, piece in zip(writers, pieces, strict=False)}
        if biases:
            # Together they are the fitted bias; the others stay as they are
            self._block[biases[0]] = self._block[biases[0]] + pieces[-1][:, 0] - parts[-1][:, 0]
        if self._reader_stride:
            for sublayer in sublayers:
                if sublayer.can_cut_neurons and sublayer.neuron_writer in writers:
                    self._fit_neuron_readers(site, before, sublayer, fitted, inputs_outputs)
        for number in range(len(self.streams)):
            inputs = self._stacked(number, bias=bool(biases))
            written = inputs @ fitted.T.to(inputs.dtype)
            self.streams[number] = layer.pass_on(before, self.streams[number] + written)
        for inputs in self._inputs:
            inputs.clear()

    def _fit_normed_writer(self, site: Site, before: int, sublayer: Sublayer) -> None:
        """Fit the writer before a post norm, then the projection behind the norm, if there is one."""
        layer, normed, number_of = self._layer, self._normed, self._site_number(site)
        weight, projection = sublayer.weight(sublayer.neuron_writer), sublayer.projection
        bias = self._block.get(sublayer.bias(sublayer.neuron_writer))
        scale = normed.scale[:, None]

        def inputs_outputs(number: int, batch: Activations) -> InputsOutputs:
            outputs = normed.outputs(batch, batch.rows(self._missing(number, batch)))
            if bias is not None:
                outputs = outputs - (normed.scale * bias).to(outputs.dtype) * normed.weight(batch)
            return batch.rows(self._inputs[0][number]) * normed.weight(batch), outputs

        kind = "neurons" if sublayer.can_cut_neurons else "write"
        base = scale * self._block[weight]
        fitted = self._ridges.fit(kind, number_of, site.activations, base, inputs_outputs)
        self._put({weight: fitted / scale})
        if self._reader_stride and sublayer.can_cut_neurons:
            self._fit_neuron_readers(site, before, sublayer, fitted, inputs_outputs)
        writer = layer.get_submodule(sublayer.neuron_writer)
        if self._basis.rotated:

            def normed_missing(number: int, batch: Activations) -> InputsOutputs:
                inputs = batch.rows(normalize(writer(self._inputs[0][number]), site.eps))
                size = inverse_size(batch.rows(batch.hidden), site.eps)
                return inputs * size, batch.rows(self._missing(number, batch)) * size

            base = self._block[projection]
            self._put({projection: self._ridges.fit("write", number_of, site.activations, base, normed_missing)})
        norm = layer.get_submodule(sublayer.post_norm)
        for number, inputs in enumerate(self._inputs[0]):
            self.streams[number] = layer.pass_on(before, self.streams[number] + norm(writer(inputs)))
        self._inputs[0].clear()

    def _missing(self, number: int, batch: Activations) -> Tensor:
        """Return what the sublayer that ran last is to add to the sliced stream, (B, T, width)."""
        target, scale = self._basis.embed(batch.hidden), self._scale
        return (target if scale is None else target / scale) - self.streams[number]

    def _put(self, weights: Tensors) -> None:
        """Change weights of the block."""
        self._block |= weights
        self._runner.assign(self._layer, self._dense.as_modules(weights.items(), self._basis.width))

    def _fit_neuron_readers(
        self, site: Site, before: int, sublayer: Sublayer, fitted: Tensor, inputs_outputs: InputsOutputsOf
    ) -> None:
        """Fit an MLP's readers to the error that its fitted writer leaves, and keep the new inputs of the writers.

        Args:
            site: The site behind the MLP.
            before: Number of the site before the MLP, in its block.
            sublayer: The MLP.
            fitted: Weights of all writers beside each other, and the bias.
            inputs_outputs: Function that gives the writers' inputs, and the missing part of the stream before them,
                weighted.
        """
        layer, writers = self._layer, self._fitted_writers(before)

        def left() -> Iterator[tuple[int, Activations, Tensor]]:
            for number, batch in enumerate(site.activations):
                if batch.group in self._ridges.groups:
                    inputs, missing = inputs_outputs(number, batch)
                    yield number, batch, missing - inputs @ fitted.T.to(inputs.dtype)

        def batches() -> Iterator[Errors]:
            for number, batch, missing in left():
                normalized = layer.normalize(before, self.streams[number])
                size = inverse_size(batch.rows(batch.hidden), site.eps)
                weight = self._normed.weight(batch) if sublayer.post_norm else size
                yield Errors(batch, normalized, self._kwargs(batch), missing, weight)

        def error() -> float:
            squares = torch.zeros(1, dtype=torch.float64, device=fitted.device)
            for _, _, missing in left():
                squares += missing.square().sum()
            return float(self._run.ranks.decide(self._run.ranks.sum(squares)))

        def put(changed: Tensors) -> None:
            self._put(changed)
            self._capture(site.activations, before, writers)

        names = tuple(name for name in sublayer.readers if sublayer.weight(name) in self._block)
        neurons = self._block[sublayer.weight(sublayer.neuron_writer)]
        writer = self._normed.scale[:, None] * neurons if sublayer.post_norm else neurons
        readers = Readers(layer, before, sublayer, names)
        step, most = fit_readers(readers, batches(), writer, self._run, self._reader_stride)
        changes = {sublayer.weight(name): change for name, change in step.items()}
        weights = {name: self._block[name] for name in changes}
        take_largest_step(weights, changes, put, lambda: error() <= most)

    def _stacked(self, number: int, *, bias: bool) -> Tensor:
        """Inputs of all writers of the site beside each other, and a one where there is a bias."""
        inputs = [of_writer[number] for of_writer in self._inputs]
        ones = [torch.ones_like(inputs[0][..., :1])] if bias else []
        return torch.cat([*inputs, *ones], dim=-1)


def _names(modules: list[str], tensors: Tensors) -> list[str]:
    """Names of the parameters of some linear layers."""
    return [name for module in modules for name in (module + ".weight", module + ".bias") if name in tensors]
