"""Recovery fine-tuning of a sliced model, from folder to folder."""

import math
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from eigenslice._version import __version__
from eigenslice.checkpoint.loading import LoadedModel
from eigenslice.checkpoint.writer import check_space
from eigenslice.data import Tokens, calibration_tokens
from eigenslice.data.batches import Batch
from eigenslice.errors import CalibrationError, EigensliceWarning, OptionsError
from eigenslice.evaluation.perplexity import Perplexity, perplexity
from eigenslice.finetune.checkpoints import Checkpoints, load_weights, storage_errors
from eigenslice.finetune.inputs import Input, Sliced, open_input, open_sliced
from eigenslice.finetune.result import merged, result_names, section, write_result
from eigenslice.finetune.training import (
    Progress,
    Reporter,
    check_logs,
    make_trainer,
    on_gpu_in_bfloat16,
    training_arguments,
    with_adapters,
)
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.report.card import write_card
from eigenslice.report.manifest import NAME, finished_manifest, versions
from eigenslice.runtime.device import resolve_device
from eigenslice.runtime.output import refuse_overlap
from eigenslice.runtime.ranks import Ranks, join_ranks
from eigenslice.runtime.work_folder import WorkFolder, check_work_folder, remove_finished, work_folder
from eigenslice.vocabulary import keep_rows, kept_ids

KEPT = 3
"""Checkpoints on the disk at the same time: the last one, the one before, and the one that is being written."""
FLOATS = 3
"""Numbers in a checkpoint for each one that is trained: itself, and two of the optimizer."""


@dataclass(frozen=True)
class FinetuneResult:
    """The result of `finetune`.

    Attributes:
        output: The written folder.
        manifest: That folder's manifest, with a section `finetune`.
        before, after: Perplexity on the held-out windows.
    """

    output: Path
    manifest: dict[str, Any]
    before: Perplexity
    after: Perplexity


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the training.

    Attributes:
        options: The options of the command.
        base: The sliced model's folder.
        loaded, teacher: The models.
        tokens: All windows, as they go into the manifest.
        train, held_out: Windows to train on, and to measure on, (T,) each.
        identity: Everything that the result depends on.
        companions: A folder of files that join the result.
        card: Metadata of the sliced model's card.
        ranks: The processes that share the windows.
        progress: Called as the work goes on.
    """

    options: FinetuneOptions
    base: Sliced
    loaded: LoadedModel
    teacher: LoadedModel | None
    tokens: Tokens
    train: list[Tensor]
    held_out: list[Tensor]
    identity: dict[str, Any]
    companions: Path
    card: dict[str, Any]
    ranks: Ranks
    progress: Progress

    @property
    def batches(self) -> list[Batch]:
        """The held-out windows."""
        return [Batch(window[None]) for window in self.held_out]


def finetune(options: FinetuneOptions, progress: Progress = lambda stage, done, total: None) -> FinetuneResult:
    """Train a sliced model for a while, and write it into a new folder of the same kind.

    Under torchrun or accelerate launch all processes call this, and the first one writes.

    Args:
        options: The options of the command.
        progress: Called as the work goes on.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
        IncompleteError: the disk is full, or the like; finished work is kept.
    """
    device = resolve_device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with join_ranks(device) as ranks:
        return _finetune(options, ranks, progress)


def _finetune(options: FinetuneOptions, ranks: Ranks, progress: Progress) -> FinetuneResult:
    finished = ranks.on_first(lambda: _check_output(options))
    base = open_sliced(options.model)
    dense = open_input(options.teacher) if options.teacher else None
    inputs: list[Input] = [base, *([dense] if dense else [])]
    refuse_overlap(options.output, [one.path for one in inputs])
    check_logs(options, [one.path for one in inputs])
    stamps = [one.stamp for one in inputs]
    with TemporaryDirectory(prefix="eigenslice-") as folder:
        companions = Path(folder)
        card = ranks.on_first(lambda: base.stage(companions, options.trust_remote_code))
        loaded = base.load("float32", options.trust_remote_code)
        base.check_saving(loaded.model)
        teacher = dense.load(None, options.trust_remote_code) if dense else None
        if teacher:
            _fit_teacher(options, base.manifest, loaded, teacher)
        tokens, train, held_out = _windows(options, loaded, loaded.model.config.get_text_config())
        identity = ranks.on_first(lambda: _identity(options, inputs, tokens, ranks))
        for one, stamp in zip(inputs, stamps, strict=True):
            one.refuse_changed(stamp)
        if finished:  # it was interrupted after the last step
            content = finished_manifest(options.output, identity)
            ranks.on_first(lambda: remove_finished(options.output))
            return _finished(options.output, content)
        job = _Job(
            *(options, base, loaded, teacher, tokens, train, held_out, identity, companions, card, ranks, progress)
        )
        return _run(job)


def _check_output(options: FinetuneOptions) -> bool:
    """Refuse an output that can't be written; tell whether it is there and complete, for a run that goes on."""
    inputs = [Path(name) for name in (options.model, options.teacher) if name]
    check_logs(options, inputs)
    if options.resume and os.path.exists(options.output / NAME):  # noqa: PTH110 - to which no name is an error
        return True
    check_work_folder(options.output, options.resume, inputs)
    return False


def _finished(output: Path, content: dict[str, Any]) -> FinetuneResult:
    """The result of an earlier run."""
    perplexity = content["finetune"]["perplexity"]
    before, after = (
        Perplexity(perplexity[when], math.log(perplexity[when]), perplexity["tokens"], {})
        for when in ("before", "after")
    )
    return FinetuneResult(output, content, before, after)


def _fit_teacher(options: FinetuneOptions, manifest: dict[str, Any], loaded: LoadedModel, teacher: LoadedModel) -> None:
    """Leave only the kept tokens to a teacher of a model whose vocabulary was cut; refuse other vocabularies."""
    ours, theirs = (m.model.config.get_text_config().vocab_size for m in (loaded, teacher))
    if ours == theirs:
        return
    kept = kept_ids(teacher.tokenizer(), loaded.tokenizer()) if "vocabulary" in manifest else None
    if kept is None or kept[-1] >= theirs:
        raise OptionsError(
            f"--teacher {options.teacher} has a vocabulary of {theirs} tokens, {options.model} of {ours}",
            allowed="the dense model that was sliced, or one with the same tokenizer",
            next_step="pass the dense model",
        )
    keep_rows(teacher.model, kept)


def _windows(options: FinetuneOptions, loaded: LoadedModel, config: Any) -> tuple[Tokens, list[Tensor], list[Tensor]]:
    """Return windows to train on and held-out windows, which are the last ones, because texts take turns."""
    wanted = options.data.model_copy(update={"samples": options.data.samples + options.held_out})
    tokens = calibration_tokens(wanted, loaded.tokenizer, config, options.chat)
    windows = []
    for batch in tokens.batches:
        masks = [None] * len(batch.input_ids) if batch.attention_mask is None else batch.attention_mask.bool()
        windows += [row if mask is None else row[mask] for row, mask in zip(batch.input_ids, masks, strict=True)]
    windows = [window for window in windows if len(window) > 1]
    if len(windows) <= options.held_out:
        raise CalibrationError(
            f"{len(windows)} windows of text, of which {options.held_out} are to be held out",
            allowed="more windows than --held-out",
            next_step="pass more text, or lower --held-out or --seqlen",
        )
    return tokens, windows[: -options.held_out], windows[-options.held_out :]


def _identity(options: FinetuneOptions, inputs: list[Input], tokens: Tokens, ranks: Ranks) -> dict[str, Any]:
    """All that the result depends on: an interrupted run goes on only where none of it has changed."""
    free = {"output", "resume", "log_to", "trust_remote_code"}
    peft = {} if options.full else {"peft": version("peft")}
    return {
        "version": __version__,
        "versions": versions() | peft,
        "finetune": options.model_dump(mode="json", exclude=free),
        "input": inputs[0].hashes,
        "teacher": inputs[1].hashes if len(inputs) > 1 else None,
        "tokens": tokens.sha256,
        "processes": ranks.size,
    }


def _resumable(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that may not change before the run goes on: only the last step cuts files."""
    return identity | {"finetune": {k: v for k, v in identity["finetune"].items() if k != "shard_gib"}}


def _run(job: _Job) -> FinetuneResult:
    """The training, in the work folder."""
    options, ranks = job.options, job.ranks
    names = result_names(job.companions)
    with work_folder(options.output, _resumable(job.identity), names, options.resume, ranks) as work:
        checkpoints = Checkpoints(work.state)
        try:
            with storage_errors(ranks):
                ranks.on_first(lambda: _prepare(job, work))
                result = _train(job, work, checkpoints)
        except BaseException:
            if ranks.first:
                with suppress(OSError):  # the error that led here says more
                    checkpoints.remove_unsealed()
            raise
    if result.after.loss >= result.before.loss:
        warnings.warn(
            f"Training didn't help: perplexity on held-out windows {result.before.perplexity:.3f} -> "
            f"{result.after.perplexity:.3f}. Try a lower --learning-rate, or more text.",
            EigensliceWarning,
            stacklevel=4,
        )
    return result


def _prepare(job: _Job, work: WorkFolder) -> None:
    """Put the companions into the work folder, and remove an incomplete result."""
    if work.result.exists():
        shutil.rmtree(work.result)
    shutil.copytree(job.companions, work.companions, dirs_exist_ok=True)
    if job.options.keep_adapter:
        job.base.copy_weights(work.companions)


def _train(job: _Job, work: WorkFolder, checkpoints: Checkpoints) -> FinetuneResult:
    """Train, or go on, and write the result."""
    options, ranks, base = job.options, job.ranks, job.base
    arguments = training_arguments(options, work.state, len(job.train), ranks.device)
    start = _start(options, checkpoints, ranks)
    model = job.loaded.model.to(arguments.device)
    before = perplexity(model, job.batches, progress=_named(job.progress, "before"))
    if not options.full:
        model = with_adapters(model, options, on_gpu_in_bfloat16(arguments))
    ranks.on_first(lambda: _check_space(job, model, checkpoints))
    reporter = Reporter(job.progress, checkpoints, ranks)
    windows = job.train, job.held_out
    trainer = make_trainer(options, arguments, model, job.teacher and job.teacher.model, windows, reporter)
    if start is not None and start["last"]:
        state = TrainerState.load_from_json(str(checkpoints.path(start["step"]) / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoints.path(start["step"])) if start else None)
        state = trainer.state
    best = state.best_global_step or state.global_step
    ranks.on_first(lambda: checkpoints.check_weights(best))
    load_weights(trainer.model, checkpoints.path(best))
    tuned, save = merged(trainer.model, base)
    after = perplexity(tuned.to(arguments.device), job.batches, progress=_named(job.progress, "after"))
    described = section(options, base, job.tokens, state.log_history, (before, after), state.global_step)
    content = base.manifest | {"finetune": described, "run": job.identity}
    if ranks.first:
        content = write_result(work, options, base, tuned.to("cpu"), save, content)
        write_card(work.result, content, options.output.name, job.card)
    return FinetuneResult(options.output, content, before, after)


def _start(options: FinetuneOptions, checkpoints: Checkpoints, ranks: Ranks) -> dict[str, Any] | None:
    """The seal of the checkpoint to go on from, None to begin."""
    start, changed = ranks.on_first(checkpoints.usable)
    where = f"training goes on from step {start['step']}" if start else "training begins anew"
    if changed and ranks.first:
        text = f"{changed} is missing or not as it was written: {where}."
        warnings.warn(text, EigensliceWarning, stacklevel=5)
    elif options.resume and start is None and ranks.first:
        warnings.warn("There is no checkpoint to resume from: starting.", EigensliceWarning, stacklevel=5)
    return start


def _check_space(job: _Job, model: Any, checkpoints: Checkpoints) -> None:
    """Refuse a disk without room for the checkpoints, the best weights and the result."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * torch.float32.itemsize
    stored = sum(math.prod(shape) * job.base.dtype_of(name).itemsize for name, (shape, _) in job.base.stored.items())
    training = (KEPT * FLOATS + 1) * trained
    writing = ((KEPT - 1) * FLOATS + 1) * trained + stored
    check_space(job.options.output, max(training, writing) - checkpoints.size)


def _named(progress: Progress, stage: str) -> Callable[[str, int, int], None]:
    return lambda _, done, total: progress(stage, done, total)
