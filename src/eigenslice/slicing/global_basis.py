"""The last pass for one basis at all sites."""

from dataclasses import dataclass
from typing import Any

import torch

from eigenslice.cut.blocks import Kept, slice_block
from eigenslice.cut.ends import GlobalBasis, block_names, global_basis, slice_embeddings, slice_head, stock_block
from eigenslice.data.batches import HELD_OUT_GROUP
from eigenslice.data.holdout import hold_out
from eigenslice.fit.gain import GainFit, fit_gain
from eigenslice.fit.neuron_readers import curvature_stride
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import sliced_head
from eigenslice.measure.importance import Measurement
from eigenslice.model.dense import NamedTensors
from eigenslice.report.manifest import site_summary
from eigenslice.runtime.device import trim_memory
from eigenslice.slicing.result_files import SLICING_STAGE, ResultFiles
from eigenslice.stream.walk import STREAMS

SLICED_STREAMS = "sliced"
"""Name of the sliced model's streams in a saved state."""


@dataclass(frozen=True)
class _Fit:
    """The result of fitting, beside the blocks' weights.

    Attributes:
        reading: What an untied head reads, (D, width).
        errors: The errors that are left behind each block.
        gain: The factor of the head's input; None where too few sequences were there to hold some out.
    """

    reading: torch.Tensor | None
    errors: list[dict[str, Any]]
    gain: GainFit | None


def slice_globally(files: ResultFiles, measurement: Measurement, *, fits: bool) -> dict[str, Any]:
    """Rotate and slice the model with one basis, or fit its blocks beside one more pass of the dense model.

    Args:
        files: The weight files to write.
        measurement: Statistics of the dense model.
        fits: Whether blocks are fitted.

    Returns:
        Entries of the manifest.
    """
    run, plan, dense = files.run, files.plan, files.run.dense
    basis, kept = global_basis(dense, plan, measurement.spectrum), measurement.kept(plan)
    files.write(slice_embeddings(dense, plan, basis.site, files.dtype))
    entries: dict[str, Any] = {
        "spectra": [site_summary("all sites", measurement.spectrum, basis.site.width)],
        "refit_errors": [],
    }
    reading, tied_gain = None, basis.tied_gain
    if fits:
        fit = _fit_blocks(files, basis, kept)
        reading, entries["refit_errors"] = fit.reading, fit.errors
        if fit.gain:
            entries["head_gain"] = fit.gain.describe()
            if tied_gain is not None:
                tied_gain = tied_gain * fit.gain.gain
            else:
                reading = (basis.site.reading if reading is None else reading) * fit.gain.gain
    else:
        _cut_blocks(files, basis, kept)
    files.write(slice_head(dense, plan, basis.site, tied_gain, files.dtype, reading))
    run.progress(SLICING_STAGE, dense.blocks, dense.blocks)
    return entries


def _write_block(files: ResultFiles, index: int, tensors: NamedTensors) -> None:
    """Write a sliced block under its number in the result."""
    dense, plan = files.run.dense, files.plan
    files.write(block_names(dense, index, stock_block(dense, plan, index, tensors), plan.site_widths[0]))


def _cut_blocks(files: ResultFiles, basis: GlobalBasis, kept: list[Kept]) -> None:
    """Rotate and slice all blocks as they are."""
    run, dense = files.run, files.run.dense
    sites = dense.table.sites(dense.config)
    bases = [basis.site] * (len(sites) + 1)
    for index, block in enumerate(files.plan.blocks):
        run.progress(SLICING_STAGE, block, dense.blocks)
        _write_block(files, index, slice_block(sites, dense.block(block), bases, shortcuts=False, kept=kept[index]))
        trim_memory()


def _fit_blocks(files: ResultFiles, basis: GlobalBasis, kept: list[Kept]) -> _Fit:
    """Fit all blocks beside the dense stream, and then the head's gain."""
    run, state, plan = files.run, files.run.state, files.plan
    batches = hold_out(run.tokens.batches, plan.site_widths[-1])
    groups = {batch.group for batch in batches} - {HELD_OUT_GROUP}
    position, errors = files.position(), []
    sites = run.walk(batches, position=position, hold=True)
    twin = SlicedTwin(
        run.dense,
        plan,
        basis.site,
        kept,
        run.dtype,
        lambda index, tensors: _write_block(files, index, tensors.items()),
        groups=groups,
        reader_stride=curvature_stride(sum(batch.tokens for batch in batches if batch.group in groups)),
        offload=run.offload,
        ranks=run.ranks,
    )
    if position:
        twin.restore(position, SLICED_STREAMS, position.content["fits"])
        errors = list(position.content["errors"])

    def content() -> dict[str, Any]:
        return {"fits": twin.content(), "errors": errors} | files.content()

    report = run.report(SLICING_STAGE)
    for site in sites:
        report(site.block)
        if not site.resumed:
            twin.arrive(site)
        if site.passed_block and not twin.waits(site):
            errors.append({"block": site.block - 1} | twin.error(site))
            streams = {STREAMS: site.streams, SLICED_STREAMS: twin.streams}
            state.save(SLICING_STAGE, site.block, streams, {}, content)
        twin.leave(site)
    head = sliced_head(run.dense, plan, basis, twin.reading)
    return _Fit(twin.reading, errors, fit_gain(run.dense, site, twin, head, run.ranks))
