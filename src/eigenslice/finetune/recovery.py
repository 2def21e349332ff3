"""Recovery fine-tuning of a sliced model, from folder to folder."""

import math
import os
import shutil
import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from eigenslice.checkpoint.writer import check_space
from eigenslice.errors import EigensliceWarning
from eigenslice.evaluation.perplexity import Perplexity
from eigenslice.finetune.checkpoints import Checkpoints, storage_errors
from eigenslice.finetune.held_out import Judge, WindowLosses
from eigenslice.finetune.identity import resumable, run_identity
from eigenslice.finetune.inputs import Input, Sliced, open_input, open_sliced
from eigenslice.finetune.models import Models, choose_weights, load_models
from eigenslice.finetune.result import Save, as_perplexity, merged, result_names, section, write_result
from eigenslice.finetune.sharded_result import merged_parts
from eigenslice.finetune.sharded_training import ShardedTrainer
from eigenslice.finetune.sharding import own_sharding
from eigenslice.finetune.trained_weights import advice
from eigenslice.finetune.training import (
    Progress,
    RecoveryTrainer,
    Reporter,
    check_logs,
    frozen,
    make_trainer,
    on_gpu_in_bfloat16,
    passes_over,
    training_arguments,
    with_adapters,
)
from eigenslice.finetune.windows import Windows, add_own_windows, text_windows
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.report.card import write_card
from eigenslice.report.manifest import NAME, finished_manifest
from eigenslice.runtime.device import resolve_device
from eigenslice.runtime.out_of_memory import memory_errors
from eigenslice.runtime.output import refuse_overlap
from eigenslice.runtime.precision import choose_precision, products
from eigenslice.runtime.ranks import Ranks, join_ranks, process_group
from eigenslice.runtime.run_state import RunState
from eigenslice.runtime.work_folder import WorkFolder, check_work_folder, remove_finished, work_folder

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
        models: The models.
        windows: Windows of texts.
        identity: Everything that the result depends on.
        companions: A folder of files that join the result.
        card: Metadata of the sliced model's card.
        ranks: The processes that share the windows.
        progress: Called as the work goes on.
    """

    options: FinetuneOptions
    base: Sliced
    models: Models
    windows: Windows
    identity: dict[str, Any]
    companions: Path
    card: dict[str, Any]
    ranks: Ranks
    progress: Progress


def finetune(
    options: FinetuneOptions,
    progress: Progress = lambda stage, done, total: None,
    slicing: SliceOptions | None = None,
) -> FinetuneResult:
    """Train a sliced model for a while, and write it into a new folder of the same kind.

    Under torchrun or accelerate launch all processes call this, and the first one writes.

    Args:
        options: The options of the command.
        progress: Called as the work goes on.
        slicing: The options of the slicing that the training is a part of; they take the place of the sliced model's
            in the manifest.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
        IncompleteError: the disk is full, or the like; finished work is kept.
    """
    device = resolve_device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    memory = memory_errors(progress, lambda stage: advice(options), options.output)
    with memory as watched, join_ranks(device) as ranks, own_sharding() as asked:
        if asked and options.place is None:
            options = options.model_copy(update={"place": "shared"})
        return _finetune(options, ranks, watched, slicing)


def _finetune(
    options: FinetuneOptions, ranks: Ranks, progress: Progress, slicing: SliceOptions | None
) -> FinetuneResult:
    finished = ranks.on_first(lambda: _check_output(options))
    base = open_sliced(options.model)
    if slicing:
        base = replace(base, manifest=base.manifest | {"options": slicing.model_dump(mode="json")})
    dense = open_input(options.teacher) if options.teacher else None
    inputs: list[Input] = [base, *([dense] if dense else [])]
    refuse_overlap(options.output, [one.path for one in inputs])
    check_logs(options, [one.path for one in inputs])
    stamps = [one.stamp for one in inputs]
    with TemporaryDirectory(prefix="eigenslice-") as folder, ExitStack() as together:
        companions = Path(folder)
        card = ranks.on_first(lambda: base.stage(companions, options.trust_remote_code))
        options = choose_weights(options, base, dense, ranks)
        if options.place != "device":
            together.enter_context(process_group(ranks.device))
        models = load_models(options, base, dense, ranks)
        windows = text_windows(options, models.trained.tokenizer, models.trained.model.config.get_text_config())
        identity = ranks.on_first(lambda: run_identity(options, inputs, windows.tokens, ranks))
        for one, stamp in zip(inputs, stamps, strict=True):
            one.refuse_changed(stamp)
        if finished:  # it was interrupted after the last step
            content = finished_manifest(options.output, identity)
            ranks.on_first(lambda: remove_finished(options.output))
            return _finished(options.output, content)
        return _run(_Job(options, base, models, windows, identity, companions, card, ranks, progress))


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


def _run(job: _Job) -> FinetuneResult:
    """The training, in the work folder."""
    options, ranks = job.options, job.ranks
    names = result_names(job.companions)
    with work_folder(options.output, resumable(job.identity), names, options.resume, ranks) as work:
        checkpoints = Checkpoints(work.state)
        try:
            with storage_errors(ranks), products(choose_precision(ranks.device, options.dtype).forward):
                ranks.on_first(lambda: _prepare(job, work))
                result = _train(job, work, checkpoints)
        except BaseException:
            if ranks.first:
                with suppress(OSError):  # the error that led here says more
                    checkpoints.remove_unsealed()
            raise
    if ranks.first and not result.manifest["finetune"]["best_step"]:
        warnings.warn(
            f"Training didn't help: at no step were all held-out texts as good as before. {options.output} has the "
            "weights that the training began with. More text may help, or a lower rate (finetune --learning-rate).",
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
    is_new = ranks.on_first(lambda: not work.began)
    loaded, teacher, windows = job.models.trained, job.models.teacher and job.models.teacher.model, job.windows
    if teacher is not None:
        teacher = teacher.to(ranks.device) if options.place == "device" else teacher
        state = RunState(work.state, ranks)
        windows = add_own_windows(windows, options, teacher, loaded.tokenizer, state, ranks, job.progress)
    model = loaded.model
    count = len(windows.train) * passes_over(windows.train, options)
    decided = options.with_batch(count, ranks.size, model.config.get_text_config().hidden_size)
    measured = sum(map(len, windows.held_out.windows))
    arguments = training_arguments(decided, work.state, windows.train, measured, ranks.device)
    start = _start(options, checkpoints, ranks, is_new)
    if options.place == "device":
        teacher = None if teacher is None else frozen(teacher, options, arguments.device)
        model = model.to(arguments.device)
    job.progress("before", 0, 1)
    judge = Judge.of(model, windows.held_out, teacher, options.distilled, ranks)
    job.progress("before", 1, 1)
    if options.place == "device" and not options.full:
        model = with_adapters(model, options, on_gpu_in_bfloat16(options, arguments.device))
    ranks.on_first(lambda: _check_space(job, model, checkpoints))
    reporter = Reporter(job.progress, checkpoints, ranks)
    kind = RecoveryTrainer if options.place == "device" else ShardedTrainer
    trainer = make_trainer(kind, options, arguments, model, windows.train, judge, reporter)
    if start is not None and start["last"]:
        trained = TrainerState.load_from_json(str(checkpoints.path(start["step"]) / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoints.path(start["step"])) if start else None)
        trained = trainer.state
    job.progress("after", 0, 1)
    tuned, save = None, None
    losses = judge.before
    best, criterion = trained.best_global_step, trained.best_metric
    if best is not None and criterion is not None and criterion < judge.before.mean:
        ranks.on_first(lambda: checkpoints.check_weights(best))
        tuned, save, losses = _trained_model(job, trainer, judge, checkpoints.path(best))
    job.progress("after", 1, 1)
    entries = section(options, base, windows, trained, (judge.before, losses), bfloat16=arguments.bf16)
    content = base.manifest | entries | {"run": job.identity}
    if ranks.first:
        content = write_result(work, options, base, tuned, save, content)
        write_card(work.result, content, options.output.name, job.card)
    return FinetuneResult(options.output, content, as_perplexity(judge.before), as_perplexity(losses))


def _trained_model(
    job: _Job, trainer: RecoveryTrainer, judge: Judge, folder: Path
) -> tuple[Any, Save | None, WindowLosses]:
    """The weights of a checkpoint as they will be stored: the whole model, how to save its adapter, and its losses.

    Of a shared model, the first process alone has the whole.
    """
    trainer.load(folder)
    if job.options.place != "device":
        tuned, save = merged_parts(trainer.model, job.models.skeleton, job.base, job.ranks)
        return tuned, save, judge.measure(trainer.model)
    tuned, save = merged(trainer.model, job.base)
    return tuned, save, judge.measure(tuned.to(trainer.args.device))


def _start(options: FinetuneOptions, checkpoints: Checkpoints, ranks: Ranks, is_new: bool) -> dict[str, Any] | None:
    """The seal of the checkpoint to go on from, None to begin; warns where there is nothing to go on from.

    `is_new` is True if the work folder held no state at all.
    """
    start, changed = ranks.on_first(checkpoints.usable)
    where = f"training goes on from step {start['step']}" if start else "training begins anew"
    if changed and ranks.first:
        text = f"{changed} is missing or not as it was written: {where}."
        warnings.warn(text, EigensliceWarning, stacklevel=5)
    elif options.resume and is_new and ranks.first:
        warnings.warn("There is no checkpoint to resume from: starting.", EigensliceWarning, stacklevel=5)
    return start


def _check_space(job: _Job, model: Any, checkpoints: Checkpoints) -> None:
    """Refuse a disk without room for the checkpoints, the best weights and the result."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * torch.float32.itemsize
    stored = sum(math.prod(shape) * job.base.dtype_of(name).itemsize for name, (shape, _) in job.base.stored.items())
    training = (KEPT * FLOATS + 1) * trained
    writing = ((KEPT - 1) * FLOATS + 1) * trained + stored
    check_space(job.options.output, max(training, writing) - checkpoints.size)
