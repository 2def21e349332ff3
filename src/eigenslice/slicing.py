"""The algorithm, on one page."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eigenslice.algebra.basis import Spectrum, principal_components
from eigenslice.checkpoint.companions import write_generation_config, write_modeling_file, write_tokenizer
from eigenslice.checkpoint.output import check_output, work_folder
from eigenslice.checkpoint.source import open_source
from eigenslice.checkpoint.writer import GIB, ShardWriter, check_space, write_json
from eigenslice.choosing import choose_plan
from eigenslice.data import Tokens, beginnings, calibration_tokens, random_sequences
from eigenslice.dense import DenseModel, NamedTensors
from eigenslice.device import resolve_device
from eigenslice.estimate import activation_bytes
from eigenslice.forms import custom_config, stock_config
from eigenslice.manifest import NAME, finished_manifest, manifest, run_identity
from eigenslice.measuring import Measurement, measure
from eigenslice.offload import Offload, choose_place
from eigenslice.options import RANDOM_SHARE, SliceOptions
from eigenslice.passes import Run, Slicing
from eigenslice.plan import Plan, stored_parameters
from eigenslice.planning import make_plans
from eigenslice.progress import Progress, no_progress
from eigenslice.ranks import Ranks, join_ranks
from eigenslice.report.card import CARD, write_card
from eigenslice.resume import RunState
from eigenslice.sampling import add_own_text
from eigenslice.stored import StoredForm


@dataclass(frozen=True)
class SliceResult:
    """What `slice_model` did: the folder it wrote and that folder's manifest."""

    output: Path
    manifest: dict[str, Any]


def slice_model(options: SliceOptions, progress: Progress = no_progress) -> SliceResult:
    """Slice a checkpoint into a new folder.

    Under torchrun, all processes call this; they share the sequences, and the first one writes.

    Args:
        options: What to slice, how far and how.
        progress: Called as the work goes on.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
        IncompleteError: the disk is full, or the like; what is done is kept.
    """
    device = resolve_device(options.device)
    with join_ranks(device) as ranks:
        return _slice(options, device, ranks, progress if ranks.first else no_progress)


def _slice(options: SliceOptions, device: torch.device, ranks: Ranks, progress: Progress) -> SliceResult:
    finished = options.resume and (options.output / NAME).exists()
    if not finished:
        ranks.on_first(lambda: check_output(options.output, options.resume))
    source = open_source(options.model, options.trust_remote_code)
    dense = DenseModel(source, device)
    families = make_plans(dense, options)
    plans = [plan for family in families for plan in family]
    _ = source.tokenizer_config  # a broken one is refused now, not when the work is done
    wait_for_hashes = source.start_hashing()  # takes about as long as the tokenizer's work
    given = calibration_tokens(options.calibration, lambda: source.tokenizer, dense.config)
    wait_for_hashes()
    identity = run_identity(options, dense, given)
    if finished:  # it was interrupted after the last step
        return SliceResult(options.output, finished_manifest(options.output, identity))
    dtype = getattr(torch, options.dtype) if options.dtype else dense.dtype
    compute = dense.dtype if device.type != "cpu" else torch.float32
    compute = getattr(torch, options.compute_dtype) if options.compute_dtype else compute
    item = torch.empty((), dtype=dtype).element_size()
    ranks.on_first(lambda: check_space(options.output, max(stored_parameters(dense, p) for p in plans) * item))
    with work_folder(options.output, identity, options.resume, ranks) as work:
        state = RunState(work.state, ranks)
        tokens = _more_tokens(given, options, dense, compute, state, ranks, progress)
        needed = activation_bytes(dense, tokens.count, compute, options.fits) // ranks.size
        place = choose_place(options.offload, needed, device)
        offload = Offload(place, device, work.offload / str(ranks.rank))
        run = Run(dense, tokens, compute, offload, ranks, state, progress)
        found = _measure(run, plans) if options.basis == "global" else None
        plan, trials = choose_plan(run, families, found, options) if found else (plans[0], [])
        stored = StoredForm(dense, plan)
        writer = ShardWriter(work.result, stored.shapes, dtype, int(options.shard_gib * GIB), stored.in_float32)
        ranks.on_first(writer.begin)

        def write(tensors: NamedTensors) -> None:
            for name, tensor in stored(tensors) if ranks.first else ():
                writer.add(name, tensor)

        refitted = options.fits and plan.cuts(dense)
        slicer = Slicing(run, plan, writer, write)
        bases = slicer.global_basis(found, refitted) if found else slicer.per_block()

        def complete() -> dict[str, Any]:
            hashes = writer.finish()
            _write_config(dense, plan, dtype, work.result)
            if plan.stock is None:
                write_modeling_file(work.result)
            write_tokenizer(source, work.result)
            write_generation_config(source, work.result)
            content = manifest(options, dense, plan, tokens, dtype)
            content |= bases | {"refitted": refitted, "trials": trials, "sha256": hashes, "run": identity}
            write_json(work.result / NAME, content)
            write_card(work.result, content, options.output.name, None if source.gguf else source.folder / CARD)
            return content

        content = ranks.on_first(complete)
    return SliceResult(options.output, content)


def _more_tokens(
    given: Tokens,
    options: SliceOptions,
    dense: DenseModel,
    compute: torch.dtype,
    state: RunState,
    ranks: Ranks,
    progress: Progress,
) -> Tokens:
    """Calibration texts, and text of the model's own or random tokens, and beginnings, if anything will be fitted."""
    if not options.fits or "seed" not in given.description:  # token ids are used as they are
        return given
    tokens = add_own_text(given, dense, options, compute, state, ranks, progress)
    share = options.random_tokens
    if share is None:
        share = RANDOM_SHARE if tokens is given else 0.0  # beside text of its own, they gain nothing
    tokenizer, vocabulary, seed = dense.source.tokenizer, dense.config.vocab_size, options.calibration.seed
    tokens = beginnings(tokens, tokenizer, vocabulary, seed)
    return random_sequences(tokens, tokenizer, vocabulary, share, seed)


def _write_config(dense: DenseModel, plan: Plan, dtype: torch.dtype, folder: Path) -> None:
    if plan.stock:
        write_json(folder / "config.json", stock_config(dense, plan, dtype))
    else:
        config = json.loads(custom_config(dense, plan, dtype).to_json_string(use_diff=False))
        write_json(folder / "config.json", config)


def _measure(run: Run, plans: list[Plan]) -> tuple[Measurement, Spectrum]:
    """What all sites of the dense model share: the principal components of the normalized stream."""
    report, dense = run.report("measuring"), run.dense
    neurons = any(plan.neurons != dense.all_neurons for plan in plans)
    heads = any(plan.heads is not None for plan in plans)
    found = measure(dense, run.stream(), run.batches, report, neurons, heads, run.state, run.ranks)
    spectrum = principal_components(found.moment, dense.layer_norm)
    vectors = run.ranks.decide(spectrum.vectors.contiguous())
    return found, replace(spectrum, vectors=vectors)
