"""transformers' Trainer with our objective."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from eigenslice.errors import OptionsError, OutputError, first_line
from eigenslice.finetune.checkpoints import Checkpoints, load_weights
from eigenslice.finetune.held_out import Judge
from eigenslice.finetune.objective import shifted_targets, summed_loss
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.runtime.output import refuse_overlap
from eigenslice.runtime.precision import choose_precision
from eigenslice.runtime.ranks import Ranks

Progress = Callable[[str, int, int], None]
EVENTS = "events.out.tfevents."
"""Beginning of the names of TensorBoard's files."""
MEASUREMENTS = 10
"""Most measurements and checkpoints in a run, where the user doesn't say how many steps lie between them."""
MEASURED = 0.4
"""Tokens that are measured in all, as a share of those that are trained on: a fifth of the time, or one measurement.

A token to measure takes two forward passes, the model's and the teacher's. A token to train on takes as long as four.
"""


class Sequences(torch.utils.data.Dataset):
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

    def __init__(self, *, teacher: Any, distill: float, judge: Judge, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher, self._distill, self._judge = teacher, distill, judge
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the held-out windows, by text; Trainer's own knows only one mean."""
        losses = self._judge.measure(self.model)
        groups = {f"{metric_key_prefix}_group_{n}": loss for n, loss in enumerate(losses.by_group().values())}
        mean = {f"{metric_key_prefix}_mean": losses.mean}
        metrics = {f"{metric_key_prefix}_loss": losses.criterion(self._judge.before), **mean, **groups}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer's own passes over experts, which a checkpoint holds in other parts than the model."""
        self.load(Path(resume_from_checkpoint))

    def load(self, folder: Path) -> None:
        """Give the model the weights of a checkpoint."""
        load_weights(self.model, folder)


class Reporter(TrainerCallback):
    """Tells how far the training is, and seals checkpoints."""

    def __init__(self, progress: Progress, checkpoints: Checkpoints, ranks: Ranks) -> None:
        self._progress, self._checkpoints, self._ranks = progress, checkpoints, ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("training", state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("training", state.global_step, state.max_steps)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ranks.wait()  # each process writes a part of it
        last = bool(control.should_training_stop)
        self._ranks.on_first(lambda: self._checkpoints.seal(state.global_step, state.best_global_step, last))


def training_arguments(
    options: FinetuneOptions, folder: Path, windows: list[Tensor], measured: int, device: torch.device
) -> TrainingArguments:
    """transformers' arguments.

    Args:
        options: The options of the command, with the batch and the learning rate decided.
        folder: The folder of checkpoints.
        windows: The windows to train on.
        measured: Number of held-out tokens.
        device: The device to train on.

    Raises:
        OptionsError: the batch can't be shared among the processes.
    """
    use_cpu = device.type != "cuda"
    assert options.batch is not None
    assert options.learning_rate is not None
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.micro_batch,
        per_device_eval_batch_size=options.micro_batch,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        adam_beta2=0.95,  # short runs: the mean over the last 20 steps, not the last 1000
        bf16=computes_in_bfloat16(options, device),
        logging_steps=1,
        eval_strategy="steps",
        save_strategy="steps",
        metric_for_best_model="loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=options.resume,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not use_cpu,
        activation_checkpointing=options.checkpoint_activations or None,
        seed=options.data.seed % 2**32,
        report_to=[name for name in options.log_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_find_unused_parameters=False,
        use_cpu=use_cpu,
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
    passes = passes_over(windows, options)
    steps = max(1, -(-int(len(windows) * passes) // options.batch))
    if options.tokens is not None:
        arguments.max_steps = steps
    trained = sum(map(len, windows)) * passes
    times = max(1, min(MEASUREMENTS, int(MEASURED * trained / measured)))
    every = options.evaluate_every or -(-steps // times)
    arguments.eval_steps = arguments.save_steps = min(every, steps)
    return arguments


def passes_over(windows: list[Tensor], options: FinetuneOptions) -> float:
    """Return how often each of these windows is trained on, as a mean."""
    return options.epochs if options.tokens is None else options.tokens / sum(map(len, windows))


def computes_in_bfloat16(options: FinetuneOptions, device: torch.device) -> bool:
    """Return whether the training computes in bfloat16: by default on GPUs and CPUs that multiply it.

    The trained weights stay in float32, and so do the optimizer's numbers.
    """
    if options.dtype is None:
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return on_gpu or choose_precision(device).forward == "bfloat16"
    return options.dtype == "bfloat16"


def on_gpu_in_bfloat16(options: FinetuneOptions, device: torch.device) -> bool:
    """Return whether weights that aren't trained may be held in bfloat16."""
    return device.type != "cpu" and computes_in_bfloat16(options, device)


def frozen(teacher: Any, options: FinetuneOptions, device: torch.device) -> Any:
    """The teacher in its place, not trained; in bfloat16 if the training is on a GPU that computes in it."""
    dtype = torch.bfloat16 if on_gpu_in_bfloat16(options, device) else None
    return teacher.requires_grad_(False).to(dtype=dtype)


def with_adapters(model: Any, options: FinetuneOptions, bfloat16: bool) -> Any:
    """The model with LoRA on all linear layers but the head; frozen weights in bfloat16 where that is computed in."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(options.data.seed)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]: any number, it is only divided by r
        lora_dropout=options.dropout,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it gives up
        return get_peft_model(model.to(torch.bfloat16) if bfloat16 else model, config)


def make_trainer(
    kind: type[RecoveryTrainer],
    options: FinetuneOptions,
    arguments: TrainingArguments,
    model: Any,
    train: list[Tensor],
    judge: Judge,
    reporter: Reporter,
) -> RecoveryTrainer:
    """Return the trainer of a model.

    Args:
        kind: The class of the trainer.
        options: The options of the command.
        arguments: The answer of `training_arguments`.
        model: The model to train, maybe with adapters.
        train: Windows to train on.
        judge: The held-out windows, with the teacher.
        reporter: The callback that seals the checkpoints.
    """
    early = [] if options.patience is None else [EarlyStoppingCallback(options.patience)]
    trainer = kind(
        teacher=judge.teacher,
        distill=options.distilled,
        judge=judge,
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=Sequences(train),
        eval_dataset=Sequences(judge.held_out.windows),
        callbacks=[reporter, *early, *_tensorboard(options)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tensorboard(options: FinetuneOptions) -> list[TrainerCallback]:
    """Its logger, into OUTPUT.logs: where transformers would log, checkpoints are removed in the end."""
    if "tensorboard" not in options.log_to:
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(logs_of(options.output))
    return [callback]


def logs_of(output: Path) -> Path:
    """The folder of TensorBoard's events."""
    return output.with_name(f"{output.name}.logs")


def check_logs(options: FinetuneOptions, inputs: Iterable[Path]) -> None:
    """Refuse a folder of logs that somebody else made, or that touches an input.

    Raises:
        OutputError.
    """
    if "tensorboard" not in options.log_to:
        return
    logs = logs_of(options.output)
    try:
        there = logs.exists() or logs.is_symlink()
        foreign = [path.name for path in logs.iterdir() if not path.name.startswith(EVENTS)] if logs.is_dir() else []
        usable = not there or (logs.is_dir() and not foreign and os.access(logs, os.W_OK | os.X_OK))
        why = f"holds what TensorBoard didn't make: {', '.join(foreign[:3])}" if foreign else "can't be written to"
        refuse_overlap(logs, inputs)
    except (OSError, ValueError) as error:
        usable, why = False, f"can't be written ({first_line(error)})"
    if not usable:
        raise OutputError(
            f"{logs} {why}",
            allowed="a free name for the logs (OUTPUT.logs), or a folder with TensorBoard's events alone",
            next_step="move it away, choose another --output, or leave --log-to tensorboard out",
        )
