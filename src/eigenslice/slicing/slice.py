"""The algorithm, on one page."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from eigenslice.checkpoint.companions import write_modeling_file
from eigenslice.checkpoint.source import Source, open_source
from eigenslice.checkpoint.writer import check_space, write_json
from eigenslice.data import Tokens, calibration_tokens
from eigenslice.fit.working_memory import working_bytes
from eigenslice.measure.importance import Measurement, measure
from eigenslice.model.anatomy import Anatomy
from eigenslice.model.dense import DenseModel
from eigenslice.modeling import MODELING_FILE
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.candidates import make_plans
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import Plan, most_neurons
from eigenslice.plan.result_config import custom_config, stock_config
from eigenslice.report.card import CARD, read_card_metadata, write_card
from eigenslice.report.manifest import NAME, finished_manifest, manifest, resumable, run_identity
from eigenslice.runtime.device import resolve_device, unmap_freed_tensors
from eigenslice.runtime.offload import Offload, choose_place
from eigenslice.runtime.out_of_memory import memory_errors
from eigenslice.runtime.output import refuse_overlap
from eigenslice.runtime.precision import Precision, choose_precision, products
from eigenslice.runtime.progress import Progress, no_progress
from eigenslice.runtime.ranks import Ranks, join_ranks
from eigenslice.runtime.run_state import RunState
from eigenslice.runtime.work_folder import WorkFolder, check_work_folder, remove_finished, work_folder
from eigenslice.search.choose import choose_plan
from eigenslice.slicing.calibration import add_sequences
from eigenslice.slicing.global_basis import slice_globally
from eigenslice.slicing.memory import activation_bytes, advice
from eigenslice.slicing.per_block import slice_per_block
from eigenslice.slicing.result_files import ResultFiles
from eigenslice.stream.run import Run
from eigenslice.vocabulary import cut_vocabulary, stage_files

LARGE_BLOCK = 64 * 1024**2
"""Size of a block in float32, in bytes, from which on less memory is worth more time (`unmap_freed_tensors`)."""


@dataclass(frozen=True)
class SliceResult:
    """The folder that `slice_model` wrote, and its manifest."""

    output: Path
    manifest: dict[str, Any]


def slice_model(
    options: SliceOptions, progress: Progress = no_progress, precision: Precision | None = None
) -> SliceResult:
    """Slice a checkpoint into a new folder.

    Under torchrun, all processes call this; they share the sequences, and the first one writes. If blocks are large,
    freed large tensors go back to the system in this process from now on (`unmap_freed_tensors`).

    Args:
        options: The options of the command.
        progress: Called as the work goes on.
        precision: The precision of each kind of arithmetic; None chooses it by the device.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
        IncompleteError: the disk is full, or the like; finished work is kept.
        MemoryRanOutError: memory ran out; finished work is kept.
    """
    device = resolve_device(options.device)
    memory = memory_errors(progress, lambda stage: advice(options, stage), options.output)
    with memory as watched, join_ranks(device) as ranks:
        machine = _Machine(device, ranks, precision or choose_precision(device, options.compute_dtype))
        return _slice(options, machine, watched if ranks.first else no_progress)


@dataclass(frozen=True)
class _Machine:
    """Where a run computes, and how.

    Attributes:
        device: The device of this process.
        ranks: The processes that share the sequences.
        precision: The precision of each kind of arithmetic.
    """

    device: torch.device
    ranks: Ranks
    precision: Precision


@dataclass(frozen=True)
class _Job:
    """The input of the passes, all of it known before the first one.

    Attributes:
        options: The options of the command.
        dense: The dense model.
        families: The plans to choose from, see `make_plans`.
        given: Tokens of the calibration texts.
        identity: Everything that the result depends on.
        companions: A folder of files that join the result.
        card: Metadata of the dense model's card.
        machine: Where the run computes.
        progress: Called as the work goes on.
    """

    options: SliceOptions
    dense: DenseModel
    families: list[list[Plan]]
    given: Tokens
    identity: dict[str, Any]
    companions: Path
    card: dict[str, Any]
    machine: _Machine
    progress: Progress

    @property
    def ranks(self) -> Ranks:
        """The processes that share the sequences."""
        return self.machine.ranks

    @property
    def plans(self) -> list[Plan]:
        """The plans of all families."""
        return [plan for family in self.families for plan in family]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the result is stored in."""
        return getattr(torch, self.options.dtype) if self.options.dtype else self.dense.dtype

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the forward pass."""
        return _compute_dtype(self.options, self.dense)

    @property
    def names(self) -> list[str]:
        """Names of files that the result may have beside its weight files."""
        return ["config.json", NAME, CARD, MODELING_FILE.name, *(path.name for path in self.companions.iterdir())]


def _slice(options: SliceOptions, machine: _Machine, progress: Progress) -> SliceResult:
    ranks = machine.ranks
    if not ranks.on_first(lambda: _is_finished(options)):
        ranks.on_first(lambda: check_work_folder(options.output, options.resume, [Path(options.model)]))
    source = open_source(options.model, options.trust_remote_code)
    refuse_overlap(options.output, [source.path])
    with TemporaryDirectory(prefix="eigenslice-") as folder:
        companions, tokenizer = Path(folder) / "companions", Path(folder) / "tokenizer"
        companions.mkdir()  # on all ranks; the first one fills it
        return _slice_source(options, cut_vocabulary(source, options, tokenizer), companions, machine, progress)


def _is_finished(options: SliceOptions) -> bool:
    """Return whether the run to resume was interrupted after the last step."""
    return options.resume and (options.output / NAME).exists()


def _slice_source(
    options: SliceOptions, source: Source, companions: Path, machine: _Machine, progress: Progress
) -> SliceResult:
    """Slice a checkpoint that was opened; `companions` is a folder for files that join the result."""
    ranks, dense = machine.ranks, DenseModel(source, machine.device)
    if max(dense.anatomy.block_sizes) * torch.float32.itemsize > LARGE_BLOCK:
        unmap_freed_tensors()
    families = make_plans(dense.anatomy, options)
    wait_for_hashes = source.start_hashing()  # takes about as long as the tokenizer's work
    given = calibration_tokens(options.calibration, lambda: source.tokenizer, dense.config)
    wait_for_hashes(progress)
    compute = _compute_dtype(options, dense)
    ranks.on_first(lambda: source.check_finite(compute))
    identity = run_identity(options, dense, given)
    if ranks.on_first(lambda: _is_finished(options)):
        content = ranks.on_first(lambda: finished_manifest(options.output, identity))
        ranks.on_all(lambda: remove_finished(options.output))
        return SliceResult(options.output, content)
    card = ranks.on_first(lambda: _stage(source, companions))
    job = _Job(options, dense, families, given, identity, companions, card, machine, progress)
    with products(machine.precision.forward):
        return _run(job)


def _stage(source: Source, folder: Path) -> dict[str, Any]:
    """Write the files that join the result into a folder, and return the metadata of the dense model's card.

    A file that can't be read or written is an error now, not when the work is done.
    """
    stage_files(source, folder)
    return {} if source.gguf else read_card_metadata(source.folder / CARD)


def _run(job: _Job) -> SliceResult:
    """Run the passes in the work folder."""
    options, dense, ranks = job.options, job.dense, job.ranks
    needed = max(stored_parameters(dense.anatomy, plan) for plan in job.plans) * job.dtype.itemsize
    ranks.on_first(lambda: check_space(options.output, needed))
    with work_folder(options.output, resumable(job.identity), job.names, options.resume, ranks) as work:
        ranks.on_first(lambda: _copy(job.companions, work.companions))
        run = _begin(job, work)
        measurement = _measure(run, job.plans) if options.basis == "global" else None
        plan, trials = choose_plan(run, job.families, measurement, options) if measurement else (job.plans[0], [])
        files = ResultFiles.begin(run, plan, work.result, job.dtype, options.shard_gib)
        fits = options.fits and plan.cuts(dense.anatomy)
        bases = (
            slice_globally(files, measurement, fits=fits, fits_neurons=options.fit_neurons)
            if measurement
            else slice_per_block(files)
        )
        entries = bases | {"refitted": fits, "trials": trials}
        content = ranks.on_first(lambda: _complete(job, work, files, entries))
    return SliceResult(options.output, content)


def _begin(job: _Job, work: WorkFolder) -> Run:
    """Return the run of a work folder: its saved state, its tokens, and the place of its activations."""
    options, dense, ranks = job.options, job.dense, job.ranks
    state = RunState(work.state, ranks)
    tokens = add_sequences(job.given, dense, options, job.compute, state, ranks, job.progress)
    needed = activation_bytes(dense.anatomy, tokens.count, job.compute, refitted=options.fits) // ranks.size
    working = working_bytes(dense.anatomy, job.compute, most_neurons(job.plans), int(options.fits))
    place = choose_place(options.offload, needed, dense.device, working)
    offload = Offload(place, dense.device, work.offload / str(ranks.rank))
    return Run(dense, tokens, job.compute, offload, ranks, state, job.progress, job.machine.precision)


def _complete(job: _Job, work: WorkFolder, files: ResultFiles, entries: dict[str, Any]) -> dict[str, Any]:
    """Write all files of the result but its weights, and return its manifest."""
    options, dense, plan, hashes = job.options, job.dense, files.plan, files.writer.finish(job.progress)
    _write_config(dense.anatomy, plan, job.dtype, work.result)
    if plan.stock is None:
        write_modeling_file(work.result)
    _copy(work.companions, work.result)
    content = manifest(options, dense, plan, files.run.tokens, job.dtype)
    content |= entries | {"precision": _described(job), "sha256": hashes, "run": job.identity}
    write_json(work.result / NAME, content)
    write_card(work.result, content, options.output.name, job.card)
    return content


def _described(job: _Job) -> dict[str, str]:
    """Return the precision of each kind of arithmetic, for the manifest."""
    described = job.machine.precision.describe()
    if job.compute != torch.float32:
        described["forward"] = str(job.compute).removeprefix("torch.")
    return described


def _copy(folder: Path, target: Path) -> None:
    """Copy everything in a folder into another one."""
    shutil.copytree(folder, target, dirs_exist_ok=True)


def _compute_dtype(options: SliceOptions, dense: DenseModel) -> torch.dtype:
    """Return the dtype of the forward pass."""
    if options.compute_dtype:
        return getattr(torch, options.compute_dtype)
    return dense.running_dtype


def _write_config(anatomy: Anatomy, plan: Plan, dtype: torch.dtype, folder: Path) -> None:
    if plan.stock:
        write_json(folder / "config.json", stock_config(anatomy, plan, dtype))
    else:
        config = json.loads(custom_config(anatomy, plan, dtype).to_json_string(use_diff=False))
        write_json(folder / "config.json", config)


def _measure(run: Run, plans: list[Plan]) -> Measurement:
    """Measure the statistics of the dense model that these plans need."""
    neurons = any(plan.neurons_per_block != run.dense.anatomy.neurons_per_block for plan in plans)
    neurons = neurons or any(plan.experts is not None for plan in plans)
    return measure(run, neurons=neurons, heads=any(plan.kv_heads or plan.query_heads for plan in plans))
