"""The passes that write a sliced model, block by block: one for a global basis, one for a basis per block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eigenslice.algebra.basis import principal_components
from eigenslice.checkpoint.writer import ShardWriter
from eigenslice.cut.blocks import Kept, SiteBasis, identity_basis, slice_block
from eigenslice.cut.ends import (
    GlobalBasis,
    block_names,
    global_basis,
    site_basis,
    slice_embeddings,
    slice_head,
    stock_block,
)
from eigenslice.data.batches import HELD_OUT_GROUP
from eigenslice.data.holdout import hold_out
from eigenslice.fit.gain import GainFit, fit_gain
from eigenslice.fit.neuron_readers import curvature_stride
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import sliced_head
from eigenslice.measure.importance import Measurement
from eigenslice.model.dense import NamedTensors, Tensors
from eigenslice.plan.plan import Plan
from eigenslice.report.manifest import site_summary
from eigenslice.runtime.device import trim_memory
from eigenslice.runtime.run_state import Position
from eigenslice.stream.run import Run
from eigenslice.stream.walk import STREAMS

SLICING_STAGE = "slicing"
SLICED_STREAMS = "sliced"


@dataclass(frozen=True)
class Fit:
    """What fitting found beside the blocks' weights.

    Attributes:
        reading: What an untied head reads, (D, width).
        errors: Those that are left behind each block.
        gain: What the head's input is multiplied by; None where too few sequences were there to hold some out.
    """

    reading: torch.Tensor | None
    errors: list[dict[str, Any]]
    gain: GainFit | None


@dataclass(frozen=True)
class Slicing:
    """The last pass of a run.

    Attributes:
        run: The run.
        plan: What the result looks like.
        writer: Knows what has been written.
        write: Takes what is to be written, under the names of the dense model.
    """

    run: Run
    plan: Plan
    writer: ShardWriter
    write: Callable[[NamedTensors], None]

    def global_basis(self, measurement: Measurement, *, refitted: bool) -> dict[str, Any]:
        """One basis for all sites; blocks are rotated and sliced, or fitted beside one more pass of the dense model.

        Returns:
            What the manifest says of it.
        """
        run, plan, spectrum = self.run, self.plan, measurement.spectrum
        dense, dtype = run.dense, self.writer.dtype
        basis, kept = global_basis(dense, plan, spectrum), measurement.kept(plan)
        sites = dense.table.sites(dense.config)

        def write_block(index: int, tensors: NamedTensors) -> None:
            self.write(block_names(dense, index, stock_block(dense, plan, index, tensors), plan.site_widths[0]))

        self.write(slice_embeddings(dense, plan, basis.site, dtype))
        found_by_fit: dict[str, Any] = {"refit_errors": []}
        reading, tied_gain = None, basis.tied_gain
        if refitted:
            fit = self._fit(basis, kept, lambda index, tensors: write_block(index, tensors.items()))
            reading, found_by_fit["refit_errors"] = fit.reading, fit.errors
            if fit.gain:
                found_by_fit["head_gain"] = fit.gain.describe()
                if tied_gain is not None:
                    tied_gain = tied_gain * fit.gain.gain
                else:
                    reading = (basis.site.reading if reading is None else reading) * fit.gain.gain
        else:
            for index, block in enumerate(plan.blocks):
                run.progress(SLICING_STAGE, block, dense.blocks)
                bases = [basis.site] * (len(sites) + 1)
                write_block(index, slice_block(sites, dense.block(block), bases, False, kept[index]))
                trim_memory()
        self.write(slice_head(dense, plan, basis.site, tied_gain, dtype, reading))
        run.progress(SLICING_STAGE, dense.blocks, dense.blocks)
        return {"spectra": [site_summary("all sites", spectrum, basis.site.width)]} | found_by_fit

    def _fit(self, basis: GlobalBasis, kept: list[Kept], write: Callable[[int, Tensors], None]) -> Fit:
        """Fit all blocks beside the dense stream, and then the head's gain."""
        run, state = self.run, self.run.state
        batches = hold_out(run.tokens.batches, self.plan.site_widths[-1])
        groups = {batch.group for batch in batches} - {HELD_OUT_GROUP}
        position, errors = self._position(), []
        sites = run.walk(batches, position=position, hold=True)
        twin = SlicedTwin(
            run.dense,
            self.plan,
            basis.site,
            kept,
            run.dtype,
            write,
            groups=groups,
            reader_stride=curvature_stride(sum(batch.tokens for batch in batches if batch.group in groups)),
            offload=run.offload,
            ranks=run.ranks,
        )
        if position:
            twin.restore(position, SLICED_STREAMS, position.content["fits"])
            errors = list(position.content["errors"])
        report = run.report(SLICING_STAGE)
        for site in sites:
            report(site.block)
            if not site.resumed:
                twin.arrive(site)
                if site.index == 0 and site.block and not twin.waits(site):
                    errors.append({"block": site.block - 1} | twin.error(site))
                    streams = {STREAMS: site.streams, SLICED_STREAMS: twin.streams}
                    state.save(
                        SLICING_STAGE,
                        site.block,
                        streams,
                        {},
                        lambda: {"fits": twin.content(), "errors": errors} | self._written(),
                    )
            twin.leave(site)
        head = sliced_head(run.dense, self.plan, basis, twin.reading)
        return Fit(twin.reading, errors, fit_gain(run.dense, site, twin, head, run.ranks))

    def _written(self) -> dict[str, Any]:
        """What the state of this pass says of the files."""
        return {"dtype": str(self.writer.dtype), "written": self.writer.flushed()}

    def _position(self) -> Position | None:
        """Where this pass was, if what it wrote until then is still there as it was written, in the same dtype."""
        state, writer = self.run.state, self.writer
        position = state.position(SLICING_STAGE)
        if position is None or position.content["dtype"] != str(writer.dtype):
            return None
        written = position.content["written"]
        if not self.run.ranks.on_first(lambda: writer.holds(written)):
            state.forget(SLICING_STAGE, writer.folder)
            return None
        writer.checksums.update(written)
        return position

    def per_block(self) -> dict[str, Any]:
        """A basis for each site, found on the network sliced so far (SliceGPT, section 3.3 and algorithm 1).

        One pass. The stream stays in the dense coordinates, projected onto what each site keeps: the dense
        sublayers then compute what the sliced ones will. A block is written when the next one's basis is known.

        Returns:
            What the manifest says of it.
        """
        run, plan, state = self.run, self.plan, self.run.state
        dense = run.dense
        sites = dense.table.sites(dense.config)
        summaries: list[dict[str, Any]] = []
        bases: list[SiteBasis] = []
        position = self._position()
        if position:
            summaries = list(position.content["summaries"])
            bases = [SiteBasis(position.tensors[str(n)].to(dense.device)) for n in range(len(sites))]
        report = run.report(SLICING_STAGE)
        for site in run.walk(run.tokens.batches, position=position):
            report(site.block)
            if site.passed_block:
                tensors = {str(n): basis.matrix for n, basis in enumerate(bases)}
                streams = {STREAMS: site.streams}
                state.save(
                    SLICING_STAGE, site.block, streams, tensors, lambda: {"summaries": summaries} | self._written()
                )
            number = site.block * len(sites) + site.index
            width = plan.site_widths[number]
            if site.layer is None and width == dense.width:
                basis = identity_basis(dense.width, dense.device)
            else:
                spectrum = principal_components(run.ranks.sum(site.moment(normalized=False)), dense.layer_norm)
                basis = SiteBasis(run.ranks.decide(site_basis(dense, spectrum, width).matrix.contiguous()))
                site.project(basis.matrix)
                summaries.append(site_summary(f"block {site.block} site {site.index}", spectrum, width))
            if number == 0:
                self.write(slice_embeddings(dense, plan, basis, self.writer.dtype))
            if site.index == 0 and site.block:
                before = site.block - 1
                block = slice_block(sites, dense.block(before), [*bases, basis], shortcuts=True)
                self.write(block_names(dense, before, block, width))
                bases = []
            bases.append(basis)
        self.write(slice_head(dense, plan, bases[-1], None, self.writer.dtype))
        run.progress(SLICING_STAGE, dense.blocks, dense.blocks)
        return {"spectra": summaries}
