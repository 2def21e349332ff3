"""The algorithm, on one page."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eigenslice.algebra.basis import Spectrum, kept_basis, principal_components
from eigenslice.assembly import block_names, global_basis, slice_embeddings, slice_head, stock_extras
from eigenslice.checkpoint.companions import write_generation_config, write_modeling_file, write_tokenizer
from eigenslice.checkpoint.source import open_source
from eigenslice.checkpoint.writer import GIB, ShardWriter, check_output, output_folder, write_json
from eigenslice.data import Tokens, calibration_tokens, random_sequences
from eigenslice.dense import DenseModel, Tensors
from eigenslice.device import resolve_device
from eigenslice.forms import custom_config, stock_config
from eigenslice.manifest import manifest, site_summary
from eigenslice.measuring import Measurement, measure
from eigenslice.options import SliceOptions
from eigenslice.plan import Plan, layout
from eigenslice.planning import make_plans
from eigenslice.refitting import SlicedTwin
from eigenslice.report.card import CARD, write_card
from eigenslice.stream import Stream
from eigenslice.transform import SiteBasis, identity_basis, slice_block
from eigenslice.trials import trial_batches, try_plans

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and of how many."""
Write = Callable[[Tensors], None]


@dataclass(frozen=True)
class SliceResult:
    """What `slice_model` did: the folder it wrote and that folder's manifest."""

    output: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the steps of one run share."""

    dense: DenseModel
    tokens: Tokens
    dtype: torch.dtype
    progress: Progress

    def stream(self) -> Stream:
        """The dense stream, for one more pass."""
        return Stream(self.dense, self.dense.device, self.dtype)

    def report(self, stage: str) -> Callable[[int], None]:
        """Progress of a stage that goes through all blocks."""
        return lambda block: self.progress(stage, block, self.dense.blocks)


def slice_model(options: SliceOptions, progress: Progress = lambda stage, done, total: None) -> SliceResult:
    """Slice a checkpoint into a new folder.

    Args:
        options: What to slice, how far and how.
        progress: Called as the work goes on.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
    """
    check_output(options.output)
    device = resolve_device(options.device)
    source = open_source(options.model, options.trust_remote_code)
    dense = DenseModel(source, device)
    plans = make_plans(dense, options)
    _ = source.tokenizer_config  # a broken one is refused now, not when the work is done
    tokens = calibration_tokens(options.calibration, lambda: source.tokenizer, dense.config)
    if options.fits and "seed" in tokens.description:  # texts, not token ids
        tokens = random_sequences(
            tokens, source.tokenizer, dense.config.vocab_size, options.random_tokens, options.calibration.seed
        )
    dtype = getattr(torch, options.dtype) if options.dtype else dense.dtype
    compute = dense.dtype if device.type != "cpu" else torch.float32
    compute = getattr(torch, options.compute_dtype) if options.compute_dtype else compute
    run = Run(dense, tokens, compute, progress)
    with output_folder(options.output) as folder:
        found = _measure(run) if options.basis == "global" else None
        plan, trials = _choose(run, plans, found)
        shapes = {_stored_name(plan, name): shape for name, (_, shape) in layout(dense, plan).items()}
        writer = ShardWriter(folder, shapes, dtype, int(options.shard_gib * GIB))

        def write(tensors: Tensors) -> None:
            for name, tensor in tensors.items():
                writer.add(_stored_name(plan, name), tensor)

        refitted = options.fits and plan.cuts(dense)
        spectra = _slice_global(run, plan, found, refitted, write) if found else _slice_per_block(run, plan, write)
        writer.finish()
        _write_config(dense, plan, dtype, folder)
        if plan.stock is None:
            write_modeling_file(folder)
        write_tokenizer(source, folder)
        write_generation_config(source, folder)
        content = manifest(options, dense, plan, tokens, dtype, spectra) | {"refitted": refitted, "trials": trials}
        write_json(folder / "eigenslice.json", content)
        write_card(folder, content, options.output.name, None if source.gguf else source.folder / CARD)
    return SliceResult(options.output, content)


def _stored_name(plan: Plan, name: str) -> str:
    """The custom class wraps the dense architecture's model."""
    return name if plan.stock else f"model.{name}"


def _write_config(dense: DenseModel, plan: Plan, dtype: torch.dtype, folder: Path) -> None:
    if plan.stock:
        write_json(folder / "config.json", stock_config(dense, plan, dtype))
    else:
        config = json.loads(custom_config(dense, plan, dtype).to_json_string(use_diff=False))
        write_json(folder / "config.json", config)


def _measure(run: Run) -> tuple[Measurement, Spectrum]:
    """What all sites of the dense model share: the principal components of the normalized stream."""
    measurement = measure(run.dense, run.stream(), run.tokens.batches, run.report("measuring"))
    return measurement, principal_components(measurement.moment, run.dense.layer_norm)


def _choose(
    run: Run, plans: list[Plan], found: tuple[Measurement, Spectrum] | None
) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan that loses least on held-out tokens, and what was lost with each one that was tried."""
    if len(plans) == 1 or found is None:
        return plans[0], []
    measurement, spectrum = found
    batches = trial_batches(run.tokens.batches)
    losses = try_plans(run.dense, plans, spectrum, measurement, batches, run.dtype, run.report("planning"))
    best = min(range(len(plans)), key=losses.__getitem__)
    return plans[best], [plan.describe() | {"kl": loss} for plan, loss in zip(plans, losses, strict=True)]


def _slice_global(
    run: Run, plan: Plan, found: tuple[Measurement, Spectrum], refitted: bool, write: Write
) -> list[dict[str, Any]]:
    """One basis for all sites; blocks are rotated and sliced, or fitted beside one more pass of the dense model."""
    dense, (measurement, spectrum) = run.dense, found
    basis, kept = global_basis(dense, plan, spectrum), measurement.kept(plan.neurons)
    sites = dense.table.sites(dense.config)

    def write_block(index: int, tensors: Tensors) -> None:
        write(block_names(dense, index, tensors | stock_extras(dense, plan, index)))

    write(slice_embeddings(dense, plan, basis.site))
    reading = None
    if refitted:
        twin = SlicedTwin(dense, plan, basis.site, kept, run.dtype, write_block)
        report = run.report("slicing")
        for site in run.stream().walk(run.tokens.batches):
            report(site.block)
            twin.step(site)
        reading = twin.reading
    else:
        for index in range(dense.blocks):
            run.progress("slicing", index, dense.blocks)
            bases = [basis.site] * (len(sites) + 1)
            write_block(index, slice_block(sites, dense.block(index), bases, shortcuts=False, kept=kept[index]))
    write(slice_head(dense, plan, basis.site, basis.tied_gain, reading))
    run.progress("slicing", dense.blocks, dense.blocks)
    return [site_summary("all sites", spectrum, basis.site.width)]


def _slice_per_block(run: Run, plan: Plan, write: Write) -> list[dict[str, Any]]:
    """A basis for each site, found on the network sliced so far (SliceGPT, section 3.3 and algorithm 1).

    One pass. The stream stays in the dense coordinates, projected onto what each site keeps: the dense
    sublayers then compute what the sliced ones will. A block is written when the next one's basis is known.
    """
    dense = run.dense
    sites = dense.table.sites(dense.config)
    summaries: list[dict[str, Any]] = []
    pending: Tensors | None = None
    bases: list[SiteBasis] = []
    report = run.report("slicing")
    for number, site in enumerate(run.stream().walk(run.tokens.batches)):
        report(site.block)
        width = plan.site_widths[number]
        if site.folded is None:
            basis = identity_basis(dense.width, dense.device)
        else:
            spectrum = principal_components(site.moment(normalized=False).matrix, dense.layer_norm)
            basis = SiteBasis(kept_basis(spectrum, width))
            site.project(basis.matrix)
            summaries.append(site_summary(f"block {site.block} site {site.index}", spectrum, width))
        if number == 0:
            write(slice_embeddings(dense, plan, basis))
        if site.index == 0 and pending is not None:
            write(block_names(dense, site.block - 1, slice_block(sites, pending, [*bases, basis], True)))
            bases = []
        pending = site.folded
        bases.append(basis)
    write(slice_head(dense, plan, bases[-1], None))
    return summaries
