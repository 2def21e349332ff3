"""The last pass for a basis per block."""

from dataclasses import replace
from typing import Any

from eigenslice.algebra.basis import Spectrum, principal_components
from eigenslice.cut.blocks import SiteBasis, identity_basis, slice_block
from eigenslice.cut.ends import block_names, site_basis, slice_embeddings, slice_head
from eigenslice.data.holdout import hold_out
from eigenslice.model.folding import FoldedBlock
from eigenslice.report.manifest import site_summary
from eigenslice.runtime.precision import products
from eigenslice.slicing.held_out_loss import WHOLE_STREAMS, WholeStreams
from eigenslice.slicing.result_files import SLICING_STAGE, ResultFiles
from eigenslice.stream.run import Run
from eigenslice.stream.walk import STREAMS, Site


def slice_per_block(files: ResultFiles) -> dict[str, Any]:
    """Find a basis for each site on the network sliced so far (SliceGPT, section 3.3 and algorithm 1), and slice.

    There is one pass. The stream stays in the dense coordinates, projected onto the kept span of each site. So the
    dense sublayers compute the same as the sliced ones will. A block is written when the basis of the next block is
    known.

    Returns:
        Entries of the manifest.
    """
    run, plan, dense = files.run, files.plan, files.run.dense
    anatomy, sites = dense.anatomy, dense.anatomy.sites
    summaries: list[dict[str, Any]] = []
    bases: list[SiteBasis] = []
    position = files.position()
    if position:
        summaries = list(position.content["summaries"])
        bases = [SiteBasis(position.tensors[str(n)].to(dense.device)) for n in range(len(sites))]

    def content() -> dict[str, Any]:
        return {"summaries": summaries} | files.content()

    report = run.report(SLICING_STAGE)
    batches = hold_out(run.tokens.batches)
    walk = run.walk(batches, position=position, hold=True)
    passed: FoldedBlock | None = None  # the block before a site
    whole = WholeStreams(run, batches)
    if position:
        whole.restore(position)
    for site in walk:
        report(site.block)
        if site.passed_block:
            tensors = {str(n): basis.matrix for n, basis in enumerate(bases)}
            streams = {STREAMS: site.streams, WHOLE_STREAMS: whole.streams}
            run.state.save(SLICING_STAGE, site.block, streams, tensors, content)
        number = site.block * len(sites) + site.index
        width = plan.site_widths[number]
        if number == 0:
            whole.begin(site)
        if site.layer is None and width == anatomy.width:
            # The class has a matrix behind every post norm, because the other bases aren't the dense model's
            basis = replace(identity_basis(anatomy.width, dense.device), rotated=True)
        else:
            spectrum = _spectrum(run, site)
            basis = SiteBasis(run.ranks.decide(site_basis(anatomy, spectrum, width).matrix.contiguous()))
            site.project(basis.matrix)
            summaries.append(site_summary(f"block {site.block} site {site.index}", spectrum, width))
        if number == 0:
            files.write(slice_embeddings(dense, plan, basis, files.dtype))
        if site.index == 0 and site.block:
            _write_block(files, site.block - 1, passed, [*bases, basis])
            bases = []
        bases.append(basis)
        passed = site.folded
        if site.layer is not None:
            whole.pass_on(site)
    loss = whole.loss(site)
    files.write(slice_head(dense, plan, bases[-1], None, files.dtype))
    run.progress(SLICING_STAGE, anatomy.block_count, anatomy.block_count)
    return {"spectra": summaries, "loss": loss}


def _write_block(files: ResultFiles, number: int, held: FoldedBlock | None, bases: list[SiteBasis]) -> None:
    """Slice and write a block, which is read again where the walk doesn't hold it: it goes on behind the block."""
    dense = files.run.dense
    folded = dense.block(number, dense.read_block(number)) if held is None else held
    block = slice_block(dense.anatomy.sites, folded, bases, shortcuts=True)
    files.write(block_names(dense, number, block, bases[-1].width))


def _spectrum(run: Run, site: Site) -> Spectrum:
    """Return the principal components of the stream at a site."""
    with products(run.precision.gram):
        moment = site.moment(normalized=False)
    return principal_components(run.ranks.sum(moment), run.dense.anatomy.layer_norm)
