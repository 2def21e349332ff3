"""The sliced model beside the dense one: each layer is fitted as the dense stream passes it.

A reader is fitted to the dense reader's output, from the sliced stream as it has become. A writer is fitted to the
dense stream after it, so that the writer also repairs the error before it. The readers of its MLP's neurons are fitted
to the error that the writer can't repair, by a Gauss-Newton step (`neuron_readers`). Nothing is trained: each layer is
fitted once, by least squares. Ridges, but that step's, are chosen on tokens that were held out.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from eigenslice.algebra.covariance import normalize
from eigenslice.algebra.refit import InputsOutputs
from eigenslice.cut.blocks import keep_inner, keep_units, rotate_end
from eigenslice.cut.ends import GlobalCut
from eigenslice.fit.expert_writers import fit_mixture
from eigenslice.fit.normed_writers import NormedWriter, fit_normed_writer
from eigenslice.fit.reader_step import Fits
from eigenslice.fit.ridges import Fitting, RidgeFits
from eigenslice.fit.site_writers import fit_site_writers
from eigenslice.fit.sliced_block import SlicedBlock
from eigenslice.model.dense import Tensors
from eigenslice.model.folding import FoldedBlock
from eigenslice.runtime.offload import OffloadedTensors
from eigenslice.runtime.run_state import Position
from eigenslice.stream.run import Run
from eigenslice.stream.walk import Activations, Site


class SlicedTwin:
    """A sliced model in the making, which `run_beside` runs beside the dense one.

    Attributes:
        reading: After the last site, an untied head's map from the sliced stream to dense coordinates, (D, width).
    """

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
        self._ridges = RidgeFits(fitting, run.ranks, run.precision)
        self._fits = Fits(run, self._ridges, fitting.reader_stride)
        self._block = SlicedBlock(run, cut.plan, self._basis)  # its last writers have yet to be fitted
        self._sites = run.dense.anatomy.sites
        self._normed: NormedWriter | None = None  # the last writer, if a norm is behind it

    @property
    def streams(self) -> OffloadedTensors:
        """The residual stream at the current site, one tensor (B, T, width) a batch; from the first site on."""
        return self._block.streams

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
        self._block.streams = self._run.offload.tensors()
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
            if self._normed and self._normed.unnormed is None:  # the dense stream goes on through other norms
                self._normed = self._normed.before_gap(site.activations, self._run.offload.tensors())
            return
        if site.block == 0 and site.index == 0:
            self._block.streams = self._run.offload.tensors()
            for batch in site.activations:
                self.streams.append(self._basis.embed(batch.hidden))
        else:
            self._fit_writers(site)
        if site.index == 0 and site.block > 0:
            self._write(self._block.place, self._block.finish())

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

        reading = self._fits.fit("read", site, self._basis.reading, inputs_outputs)
        if site.folded is None:
            assert site.layer is None, "a twin needs the weights that the walk holds"
            self.reading = reading
        else:
            self._run_sublayers(site, site.folded, reading)

    def _run_sublayers(self, site: Site, folded: FoldedBlock, reading: Tensor) -> None:
        """Give a site's sublayers weights, and keep the inputs of their writers."""
        block, self._normed = self._block, None
        block.place = self._plan.kept_blocks.index(site.block)
        kept = self._kept[block.place]
        for sublayer in self._sites[site.index]:
            ends = keep_units(sublayer, folded, kept)
            rotated = (rotate_end(sublayer, name, weight, reading, self._basis) for name, weight in ends)
            block.put(dict(rotated) | keep_inner(sublayer, folded, kept))
            if sublayer.post_norm:
                self._normed = NormedWriter(folded[sublayer.post_gain], self._basis, site.eps)
        block.run(site.activations, site.index)

    def _fit_writers(self, site: Site) -> None:
        """Fit the writers before a site so that the sliced stream becomes the dense stream in the basis."""
        before = (site.index - 1) % len(self._sites)
        if self._block.mixture:
            fit_mixture(self._block, site, before, self._block.mixture, self._fits)
        elif self._normed:
            fit_normed_writer(self._block, site, before, self._normed, self._fits)
        else:
            fit_site_writers(self._block, site, before, self._fits)
