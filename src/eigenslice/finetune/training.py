"""transformers' Trainer with our objective, and checkpoints from which a run can go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from eigenslice.errors import OptionsError, OutputError
from eigenslice.finetune.objective import shifted_targets, summed_loss
from eigenslice.finetune.options import FinetuneOptions

Progress = Callable[[str, int, int], None]
COMPLETE = "complete"
"""A file in each checkpoint that was written to its end."""
SETTINGS = "settings.json"
MEASUREMENTS = 10
"""Measurements and checkpoints in a run."""


class Windows(torch.utils.data.Dataset):
    """Sequences of token ids, (T,) each."""

    def __init__(self, windows: list[Tensor]) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[index]


def collate(windows: list[Tensor]) -> dict[str, Tensor]:
    """A batch; shorter windows are padded on the right."""
    longest = max(map(len, windows))
    ids = torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))) for w in windows])
    mask = torch.stack([torch.arange(longest) < len(w) for w in windows]).long()
    padded = not mask.all()
    targets = shifted_targets(ids, mask if padded else None)
    # Trainer counts the targets under this name, for the mean over all windows of a step
    batch = {"input_ids": ids, "labels": targets, "shift_labels": targets}
    return batch | {"attention_mask": mask} if padded else batch


class RecoveryTrainer(Trainer):
    """Trainer with the objective of recovery; `labels` are targets, shifted already."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the targets of the whole step

    def __init__(self, *, teacher: Any, distill: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher, self._distill = teacher, distill
        self.model_accepts_loss_kwargs = True  # so that the targets of a step are counted

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the targets of one optimizer step, of which this batch holds a part."""
        read = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        expected = None
        if self._teacher is not None:
            with torch.no_grad(), self.autocast_smart_context_manager():
                expected = self._teacher(**read, use_cache=False).logits
        outputs = model(**read, use_cache=False)
        loss = summed_loss(outputs.logits, inputs["labels"], expected, self._distill)
        assert num_items_in_batch is not None
        loss = loss / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss


class Reporter(TrainerCallback):
    """Tells how far the training is, and marks checkpoints as complete."""

    def __init__(self, progress: Progress, folder: Path) -> None:
        self._progress, self._folder = progress, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("training", state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("training", state.global_step, state.max_steps)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes a part of it
        if state.is_world_process_zero:
            (self._folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def training_arguments(options: FinetuneOptions, folder: Path, windows: int) -> TrainingArguments:
    """transformers' arguments.

    Args:
        options: What the user chose.
        folder: Where checkpoints go.
        windows: Number of windows to train on.

    Raises:
        OptionsError: the batch can't be shared among the processes.
    """
    device: dict[str, Any] = {"use_cpu": options.device == "cpu" or not torch.cuda.is_available()}
    bfloat16 = options.dtype == "bfloat16"
    if options.dtype is None and not device["use_cpu"]:
        bfloat16 = torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.micro_batch,
        per_device_eval_batch_size=options.micro_batch,
        num_train_epochs=options.epochs,
        learning_rate=options.rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        adam_beta2=0.95,  # short runs: the mean over the last 20 steps, not the last 1000
        bf16=bfloat16,
        logging_steps=1,
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=options.resume,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not device["use_cpu"],
        activation_checkpointing=options.checkpoint_activations or None,
        seed=options.data.seed % 2**32,
        report_to=[name for name in options.log_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
        **device,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are for several processes; DataParallel is no longer advised by torch
    share = options.micro_batch * arguments.world_size
    if options.batch % share:
        raise OptionsError(
            f"--batch {options.batch} for {arguments.world_size} processes of --micro-batch {options.micro_batch}",
            allowed=f"a multiple of {share}",
            next_step="change one of them",
        )
    arguments.gradient_accumulation_steps = options.batch // share
    steps = -(-int(windows * options.epochs) // options.batch)
    every = options.evaluate_every or max(1, -(-steps // MEASUREMENTS))
    arguments.eval_steps = arguments.save_steps = min(every, steps)
    return arguments


def on_gpu_in_bfloat16(arguments: TrainingArguments) -> bool:
    """Whether weights that aren't trained may be held in bfloat16."""
    return bool(arguments.bf16) and arguments.device.type != "cpu"


def make_trainer(
    options: FinetuneOptions,
    arguments: TrainingArguments,
    model: Any,
    teacher: Any,
    train: list[Tensor],
    held_out: list[Tensor],
    progress: Progress,
) -> RecoveryTrainer:
    """The trainer of a model; the teacher is moved to its device, and to bfloat16 where a GPU computes in that."""
    if teacher is not None:
        teacher = teacher.requires_grad_(False)
        teacher = teacher.to(device=arguments.device, dtype=torch.bfloat16 if on_gpu_in_bfloat16(arguments) else None)
    early = [] if options.patience is None else [EarlyStoppingCallback(options.patience)]
    trainer = RecoveryTrainer(
        teacher=teacher,
        distill=options.distilled,
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=Windows(train),
        eval_dataset=Windows(held_out),
        callbacks=[Reporter(progress, Path(str(arguments.output_dir))), *early, *_tensorboard(options)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tensorboard(options: FinetuneOptions) -> list[TrainerCallback]:
    """Its logger, into OUTPUT.logs: where transformers would log, checkpoints are removed in the end."""
    if "tensorboard" not in options.log_to:
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(options.output.with_name(f"{options.output.name}.logs"))
    return [callback]


def checkpoints_of(output: Path) -> Path:
    """Where the checkpoints of a run lie until it is done."""
    return output.with_name(f"{output.name}.checkpoints")


def checkpoint_to_resume(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """The last complete checkpoint of a run with these settings, None to start; later parts are removed.

    Raises:
        OutputError: there are checkpoints, and the run isn't to be resumed.
        OptionsError: they are of a run with other settings.
    """
    if not folder.exists():
        return None
    if not resume:
        raise OutputError(
            f"{folder} holds the checkpoints of an interrupted run",
            allowed="--resume with the same options, or no such folder",
            next_step="pass --resume, or remove the folder to start anew",
        )
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if stored != settings:
        different = sorted(k for k in settings if (stored or {}).get(k) != settings[k])
        raise OptionsError(
            f"--resume: the run in {folder} has another {', '.join(different)}",
            allowed="the same options, model and teacher as the interrupted run's",
            next_step="correct the options, or remove the folder to start anew",
        )
    for path in _checkpoints(folder).values():
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return last_complete(folder)


def last_complete(folder: Path) -> Path | None:
    """The last complete checkpoint, None if there is none."""
    complete = {step: path for step, path in _checkpoints(folder).items() if (path / COMPLETE).exists()}
    return complete[max(complete)] if complete else None


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints by their steps."""
    return {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.is_dir()}
