"""Recovery fine-tuning of a sliced model, from folder to folder."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenslice.algebra.finite import all_finite
from eigenslice.checkpoint.output import check_output, work_folder
from eigenslice.checkpoint.source import locate
from eigenslice.checkpoint.weights import INDEX, SafetensorsWeights, file_hashes
from eigenslice.checkpoint.writer import GIB, write_json
from eigenslice.data import Tokens, calibration_tokens
from eigenslice.errors import CalibrationError, CheckpointError, EigensliceWarning, OptionsError, OutputError
from eigenslice.evaluate import LoadedModel, Perplexity, load_model, perplexity
from eigenslice.finetune.options import FinetuneOptions
from eigenslice.finetune.training import (
    SETTINGS,
    Progress,
    checkpoint_to_resume,
    checkpoints_of,
    last_complete,
    make_trainer,
    on_gpu_in_bfloat16,
    training_arguments,
)
from eigenslice.manifest import NAME, read_manifest
from eigenslice.report.card import CARD, write_card
from eigenslice.stream import Batch

ADAPTER = "adapter_config.json"
REWRITTEN = {NAME, "README.md", INDEX}
"""Files of the input that the output has its own versions of, beside the weights."""


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes:
        output: The folder it wrote.
        manifest: That folder's manifest, with a section `finetune`.
        before, after: Perplexity on the held-out windows.
    """

    output: Path
    manifest: dict[str, Any]
    before: Perplexity
    after: Perplexity


def finetune(options: FinetuneOptions, progress: Progress = lambda stage, done, total: None) -> FinetuneResult:
    """Train a sliced model for a while, and write it into a new folder of the same kind.

    Under torchrun or accelerate launch all processes call this, and the first one writes.

    Args:
        options: What to train, on what and how.
        progress: Called as the work goes on.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
    """
    check_output(options.output)
    folder, manifest = _sliced_folder(options.model)
    loaded = load_model(options.model, "cpu", "float32", options.trust_remote_code)
    teacher = load_model(options.teacher, "cpu", None, options.trust_remote_code) if options.teacher else None
    config = loaded.model.config.get_text_config()
    if teacher:
        _check_teacher(options, loaded, teacher)
    tokens, train, held_out = _windows(options, loaded, config)
    checkpoints = checkpoints_of(options.output)
    arguments = training_arguments(options, checkpoints, len(train))
    settings = _settings(options, folder, tokens)
    first = arguments.process_index == 0
    with arguments.main_process_first(local=False):  # it decides, the others follow
        start = checkpoint_to_resume(checkpoints, settings, options.resume) if first else last_complete(checkpoints)
        if first:
            if options.resume and start is None:
                warnings.warn("There is no checkpoint to resume from: starting.", EigensliceWarning, stacklevel=2)
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(checkpoints / SETTINGS, settings)

    batches = [Batch(window[None]) for window in held_out]
    model = loaded.model.to(arguments.device)
    before = perplexity(model, batches, progress=_named(progress, "before"))
    if not options.full:
        model = _with_adapters(model, options, on_gpu_in_bfloat16(arguments))
    trainer = make_trainer(options, arguments, model, teacher and teacher.model, train, held_out, progress)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    history = trainer.state.log_history

    stored = getattr(torch, manifest["dtype"])
    tuned, adapter = _merged(trainer.model, stored)
    after = perplexity(tuned.to(arguments.device), batches, progress=_named(progress, "after"))
    section = _section(options, tokens, folder, history, before, after, trainer.state.global_step)
    content = manifest | {"finetune": section}
    if first:
        with work_folder(options.output, {"finetune": settings}, resume=False) as work:
            target = work.result
            _copy_rest(folder, target, weights=options.keep_adapter)
            if options.keep_adapter:
                adapter(target)
            else:
                _write_weights(tuned.to(device="cpu", dtype=stored), folder, target, options.shard_gib)
            content["sha256"] = file_hashes(SafetensorsWeights(target).files)
            write_json(target / NAME, content)
            write_card(target, content, options.output.name, folder / CARD)
        shutil.rmtree(checkpoints)
    if after.loss >= before.loss:
        warnings.warn(
            f"Training didn't help: perplexity on held-out windows {before.perplexity:.3f} -> {after.perplexity:.3f}. "
            "Try a lower --learning-rate, or more text.",
            EigensliceWarning,
            stacklevel=2,
        )
    return FinetuneResult(options.output, content, before, after)


def _named(progress: Progress, stage: str) -> Progress:
    return lambda _, done, total: progress(stage, done, total)


def _sliced_folder(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder and manifest of a sliced model.

    Raises:
        CheckpointError: it is none, or has an adapter of its own.
    """
    folder, gguf = locate(name)
    manifest = None if gguf else read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{name} is no sliced model: it has no {NAME}",
            allowed="a folder that eigenslice slice or eigenslice finetune wrote",
            next_step="slice the model first",
        )
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{name} holds an adapter beside its weights",
            allowed="a folder in which adapters are merged",
            next_step="train again without --keep-adapter, or from the model that was sliced",
        )
    return folder, manifest


def _check_teacher(options: FinetuneOptions, loaded: LoadedModel, teacher: LoadedModel) -> None:
    ours, theirs = (m.model.config.get_text_config().vocab_size for m in (loaded, teacher))
    if ours != theirs:
        raise OptionsError(
            f"--teacher {options.teacher} has a vocabulary of {theirs} tokens, {options.model} of {ours}",
            allowed="the dense model that was sliced, or one with the same tokenizer",
            next_step="pass the dense model",
        )


def _windows(options: FinetuneOptions, loaded: LoadedModel, config: Any) -> tuple[Tokens, list[Tensor], list[Tensor]]:
    """Windows to train on and windows held out: the last ones, as texts take turns."""
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


def _settings(options: FinetuneOptions, folder: Path, tokens: Tokens) -> dict[str, Any]:
    """What an interrupted run must have in common with the one that goes on."""
    chosen = options.model_dump(mode="json", exclude={"resume", "log_to", "output", "trust_remote_code", "shard_gib"})
    return chosen | {"weights": file_hashes(SafetensorsWeights(folder).files), "tokens": tokens.description}


def _with_adapters(model: Any, options: FinetuneOptions, bfloat16: bool) -> Any:
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


def _merged(model: Any, stored: torch.dtype) -> tuple[Any, Callable[[Path], None]]:
    """The trained model with the values that will be stored, in float32 on CPU, and a function that saves its adapter.

    The sum of weight and adapter is rounded once, to the stored dtype.
    """
    model = model.to(device="cpu", dtype=torch.float32)
    if not hasattr(model, "merge_and_unload"):
        return model.to(stored).float().eval(), lambda folder: None
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    tensors = {name: tensor.clone().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}

    def save(folder: Path) -> None:
        config.inference_mode = True
        config.base_model_name_or_path = None  # the weights lie beside it
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return model.merge_and_unload().to(stored).float().eval(), save


def _copy_rest(folder: Path, target: Path, weights: bool) -> None:
    """Copy what training doesn't change: config, tokenizer, the custom class; with an adapter also the weights."""
    changed = {file.name for file in SafetensorsWeights(folder).files} | REWRITTEN
    kept = set() if not weights else changed - {NAME, "README.md"}
    for file in folder.iterdir():
        if file.is_file() and (file.name not in changed or file.name in kept):
            shutil.copyfile(file, target / file.name)


def _write_weights(model: Any, folder: Path, target: Path, shard_gib: float) -> None:
    """Write the weights by transformers, and check that they are the same tensors as the input's.

    Raises:
        OutputError: NaN or infinite numbers.
    """
    broken = [name for name, tensor in model.state_dict().items() if not all_finite(tensor)]
    if broken:
        raise OutputError(
            f"{broken[0]} has NaN or infinite numbers after training",
            allowed="finite weights",
            next_step="lower --learning-rate",
        )
    config = (target / "config.json").read_bytes()
    generation = target / "generation_config.json"
    generation_config = generation.read_bytes() if generation.exists() else None
    model.save_pretrained(target, max_shard_size=int(shard_gib * GIB))
    (target / "config.json").write_bytes(config)
    if generation_config is not None:
        generation.write_bytes(generation_config)
    else:
        generation.unlink(missing_ok=True)
    old, new = SafetensorsWeights(folder), SafetensorsWeights(target)
    before = {name: (old.shape(name), old.dtype(name)) for name in old.names()}
    written = {name: (new.shape(name), new.dtype(name)) for name in new.names()}
    if before != written:
        different = sorted(k for k in before.keys() | written.keys() if before.get(k) != written.get(k))
        raise OutputError(
            f"{target} would not hold the input's tensors: {', '.join(different[:3])}",
            allowed="the same names, shapes and dtype",
            next_step="report this model",
        )
    for file in new.files:
        file.chmod(0o644)


def _section(
    options: FinetuneOptions,
    tokens: Tokens,
    folder: Path,
    history: list[dict[str, float]],
    before: Perplexity,
    after: Perplexity,
    steps: int,
) -> dict[str, Any]:
    """The manifest's section on the training."""
    return {
        "base": {"name": options.model, "sha256": file_hashes(SafetensorsWeights(folder).files)},
        "teacher": options.teacher,
        "objective": {"distillation": options.distilled, "next_token": 1 - options.distilled},
        "trained": "all weights" if options.full else f"LoRA, r={options.rank}, alpha={options.alpha:g}",
        "data": tokens.description | {"held_out": options.held_out},
        "steps": steps,
        "perplexity": {"before": before.perplexity, "after": after.perplexity, "tokens": before.tokens},
        "loss": [[int(h["step"]), h["loss"]] for h in history if "loss" in h],
        "held_out_loss": [[int(h["step"]), h["eval_loss"]] for h in history if "eval_loss" in h],
        "options": json.loads(options.model_dump_json()),
    }
