"""The last pass for one basis at all sites."""

from dataclasses import dataclass
from typing import Any

import torch

from eigenslice.cut.blocks import slice_block
from eigenslice.cut.ends import GlobalCut, block_names, slice_embeddings, slice_head, stock_block
from eigenslice.data.batches import HELD_OUT_GROUP
from eigenslice.data.holdout import hold_out
from eigenslice.fit.beside import run_beside
from eigenslice.fit.gain import GainFit, fit_gain
from eigenslice.fit.neuron_readers import curvature_stride
from eigenslice.fit.ridges import Fitting
from eigenslice.fit.twin import SlicedTwin
from eigenslice.measure.divergence import make_heads
from eigenslice.measure.importance import Measurement
from eigenslice.measure.stream_error import stream_error
from eigenslice.model.dense import NamedTensors
from eigenslice.report.manifest import site_summary
from eigenslice.runtime.device import trim_memory
from eigenslice.slicing.held_out_loss import loss_beside, unfitted_loss
from eigenslice.slicing.result_files import SLICING_STAGE, ResultFiles

SLICED_STREAMS = "sliced"
"""Name of the sliced model's streams in a saved state."""


@dataclass(frozen=True)
class _Fit:
    """The result of fitting, beside the blocks' weights.

    Attributes:
        reading: The untied head's map from the sliced stream to dense coordinates, (D, width).
        errors: The errors that are left behind each block.
        gain: Factors of the head's input; None if there were too few sequences to hold some out.
    """

    reading: torch.Tensor | None
    errors: list[dict[str, Any]]
    gain: GainFit | None
    loss: dict[str, Any]


def slice_globally(
    files: ResultFiles, measurement: Measurement, *, fits: bool, fits_neurons: bool = True
) -> dict[str, Any]:
    """Rotate and slice the model with one basis, or fit its blocks beside one more pass of the dense model.

    Args:
        files: The weight files to write.
        measurement: Statistics of the dense model.
        fits: True if blocks are fitted.
        fits_neurons: True if the inputs of MLP neurons are fitted, too.

    Returns:
        Entries of the manifest.
    """
    run, plan, dense = files.run, files.plan, files.run.dense
    cut = measurement.cut(dense, plan)
    basis = cut.basis
    files.write(slice_embeddings(dense, plan, basis.site, files.dtype))
    entries: dict[str, Any] = {
        "spectra": [site_summary("all sites", measurement.spectrum, basis.site.width)],
        "refit_errors": [],
    }
    reading, tied_gain = None, basis.tied_gain
    if fits:
        fit = _fit_blocks(files, cut, fits_neurons)
        reading, entries["refit_errors"], entries["loss"] = fit.reading, fit.errors, fit.loss
        if fit.gain:
            entries["head_gain"] = fit.gain.describe()
            if tied_gain is not None:
                tied_gain = tied_gain * fit.gain.gain
            else:
                reading = (basis.site.reading if reading is None else reading) * fit.gain.gain
    else:
        entries["loss"] = unfitted_loss(run, cut)
        _cut_blocks(files, cut)
    files.write(slice_head(dense, plan, basis.site, tied_gain, files.dtype, reading))
    run.progress(SLICING_STAGE, dense.anatomy.block_count, dense.anatomy.block_count)
    return entries


def _write_block(files: ResultFiles, index: int, tensors: NamedTensors) -> None:
    """Write a sliced block under its number in the result."""
    dense, plan = files.run.dense, files.plan
    files.write(block_names(dense, index, stock_block(dense.anatomy, plan, index, tensors), plan.site_widths[0]))


def _cut_blocks(files: ResultFiles, cut: GlobalCut) -> None:
    """Rotate and slice all blocks as they are."""
    run, dense = files.run, files.run.dense
    sites = dense.anatomy.sites
    bases = [cut.basis.site] * (len(sites) + 1)
    for index, block in enumerate(cut.plan.kept_blocks):
        run.progress(SLICING_STAGE, block, dense.anatomy.block_count)
        folded = dense.block(block, dense.read_block(block))
        _write_block(files, index, slice_block(sites, folded, bases, shortcuts=False, kept=cut.kept[index]))
        trim_memory()


def _fit_blocks(files: ResultFiles, cut: GlobalCut, fits_neurons: bool) -> _Fit:
    """Fit all blocks beside the dense stream, and then the head's gain."""
    run = files.run
    batches = hold_out(run.tokens.batches, cut.plan.site_widths[-1])
    groups = {batch.group for batch in batches} - {HELD_OUT_GROUP}
    stride = curvature_stride(sum(batch.tokens for batch in batches if batch.group in groups))
    fitting = Fitting(groups, reader_stride=stride if fits_neurons else 0)
    twin = SlicedTwin(run, cut, fitting, lambda index, tensors: _write_block(files, index, tensors.items()))
    position = files.position()
    errors = list(position.content["errors"]) if position else []
    beside = run_beside(
        run,
        batches,
        {SLICED_STREAMS: twin},
        stage=SLICING_STAGE,
        position=position,
        report=run.report(SLICING_STAGE),
        content=lambda: {"errors": errors} | files.content(),
    )
    for site in beside:
        if site.passed_block and not twin.is_dropped_at(site):
            error = stream_error(site, cut.basis.site, twin.streams, run.ranks)
            errors.append({"block": site.block - 1} | error)
    whole, (head,) = make_heads(run.dense, [(cut, twin.reading)])
    gain = fit_gain(run, site, twin.streams, whole, head)
    loss = loss_beside(run, batches, site, twin.streams, (whole, head), gain.gain if gain else None)
    return _Fit(twin.reading, errors, gain, loss)
