"""From trained weights to the files of the result."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState

from eigenslice.algebra.finite import all_finite
from eigenslice.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from eigenslice.checkpoint.names import CONFIG
from eigenslice.checkpoint.weights import SafetensorsWeights
from eigenslice.checkpoint.writer import GIB, write_json
from eigenslice.errors import IncompleteError, OutputError
from eigenslice.evaluation.perplexity import Perplexity, of_loss
from eigenslice.finetune.held_out import WindowLosses
from eigenslice.finetune.inputs import Sliced, stored_tensors
from eigenslice.finetune.windows import Windows
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.report.card import CARD
from eigenslice.report.manifest import NAME
from eigenslice.runtime.durable import file_hashes
from eigenslice.runtime.output import WEIGHT_FILE
from eigenslice.runtime.work_folder import WorkFolder

Save = Callable[[Path], None]


def result_names(companions: Path) -> list[str]:
    """Return names of the result's files beside its weight files; `companions` is the folder of staged files."""
    return [CONFIG, NAME, CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *(path.name for path in companions.iterdir())]


def merged(model: Any, base: Sliced) -> tuple[Any, Save]:
    """The trained model with the values that will be stored, in float32 on CPU, and a function that saves its adapter.

    The sum of weight and adapter is rounded once, to the dtype that the tensor is stored in.

    Raises:
        OutputError: NaN or infinite numbers.
        IncompleteError: numbers that only the stored dtype can't hold.
    """
    model, save = model.to(device="cpu", dtype=torch.float32), _no_adapter
    if hasattr(model, "peft_config"):
        save = _saves_adapter(model)
        model = model.merge_and_unload()
    broken = _not_finite(model)
    if broken:
        raise OutputError(
            f"{broken} has NaN or infinite numbers after training",
            allowed="finite weights",
            next_step="lower --learning-rate",
        )
    cast(model, base)
    broken = _not_finite(model)
    if broken:
        raise IncompleteError(
            f"{broken} has numbers after training that {str(base.dtype_of(broken)).removeprefix('torch.')} can't hold",
            allowed="weights that fit the dtype that the sliced model is stored in",
            next_step="slice with --dtype bfloat16 or float32 and train that; the checkpoints in float32 are kept",
        )
    return model.float().eval(), save


def _not_finite(model: Any) -> str:
    """The first tensor with NaN or infinite numbers, "" if there is none."""
    return next((name for name, tensor in model.state_dict().items() if not all_finite(tensor)), "")


def cast(model: Any, base: Sliced) -> None:
    """Give each tensor of a model the dtype that it is stored in."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(base.dtype_of(name))


def _no_adapter(_: Path) -> None:
    """All weights were trained."""


def _saves_adapter(model: Any) -> Save:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    tensors = {name: tensor.clone().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}

    def save(folder: Path) -> None:
        config.inference_mode = True
        config.base_model_name_or_path = None  # the weights lie beside it
        config.save_pretrained(folder)
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    return save


def write_result(
    work: WorkFolder, options: FinetuneOptions, base: Sliced, tuned: Any, save: Save | None, content: dict[str, Any]
) -> dict[str, Any]:
    """Write weights, or base weights and adapter, and then all files that were staged.

    If no step was better than the sliced model, the sliced model's files are copied.

    Args:
        work: The work folder; its `companions` are moved into its `result`.
        options: The options of the command.
        base: The sliced model, as it was before the training.
        tuned, save: The answer of `merged`; None if no step was better.
        content: The manifest without the hashes of the weights.

    Returns:
        The manifest.

    Raises:
        OutputError: the tensors to write aren't the input's tensors.
    """
    scratch = work.offload / "saved"  # libraries write more into it than is wanted
    scratch.mkdir()
    work.result.mkdir(exist_ok=True)
    adapted = options.keep_adapter and save is not None
    if save is None:
        base.copy_weights(work.companions)
    elif options.keep_adapter:
        save(scratch)
    else:
        cast(tuned.to("cpu"), base)
        tuned.save_pretrained(scratch, max_shard_size=int(options.shard_gib * GIB))
    for file in sorted(scratch.iterdir()):
        if WEIGHT_FILE.fullmatch(file.name) or file.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            file.chmod(0o644)
            file.rename(work.result / file.name)
    for path in sorted(work.companions.iterdir()):
        path.rename(work.result / path.name)
    _check_tensors(work.result, base)
    adapter = [work.result / ADAPTER_WEIGHTS] if adapted else []
    content = content | {"sha256": file_hashes([*SafetensorsWeights(work.result).files, *adapter])}
    write_json(work.result / NAME, content)
    return content


def _check_tensors(folder: Path, base: Sliced) -> None:
    """Refuse weights that aren't the same tensors as the input's."""
    before, written = base.stored, stored_tensors(folder)
    if before != written:
        different = sorted(k for k in before.keys() | written.keys() if before.get(k) != written.get(k))
        raise OutputError(
            f"{folder} would not hold the input's tensors: {', '.join(different[:3])}",
            allowed="the same names, shapes and dtype",
            next_step="report this model",
        )


def section(
    options: FinetuneOptions,
    base: Sliced,
    windows: Windows,
    trained: TrainerState,
    measured: tuple[WindowLosses, WindowLosses],
    *,
    bfloat16: bool,
) -> dict[str, Any]:
    """Return the manifest's entries that the training adds or changes.

    Args:
        options: The options of the command.
        base: The sliced model, as it was before the training.
        windows: The windows, with the held-out windows.
        trained: Trainer's state behind the last step.
        measured: Losses on the held-out windows, before the training and of the result.
        bfloat16: True if the training computed in bfloat16.

    Returns:
        The section `finetune`; and `loss`, if the dense model was the teacher.
    """
    before, after = measured
    perplexities = [as_perplexity(losses) for losses in measured]
    groups = zip(before.by_group().items(), after.by_group().values(), strict=True)
    best = trained.best_global_step if after is not before else 0
    content: dict[str, Any] = {
        "finetune": {
            "base": {"name": options.model, "sha256": base.hashes},
            "teacher": options.teacher,
            "objective": {"distillation": options.distilled, "next_token": 1 - options.distilled},
            "trained": "all weights" if options.full else f"LoRA, r={options.rank}, alpha={options.alpha:g}",
            "data": windows.tokens.description
            | {"held_out": len(windows.held_out.windows), "own_sequences": windows.own},
            "computed_in": "bfloat16" if bfloat16 else "float32",
            "steps": trained.global_step,
            "best_step": best,
            "perplexity": {
                "before": perplexities[0].perplexity,
                "after": perplexities[1].perplexity,
                "tokens": perplexities[0].tokens,
            },
            "texts": [{"text": name, "before": old, "after": new} for (name, old), new in groups],
            "loss": _logged(trained.log_history, "loss"),
            "held_out_loss": [[0, before.mean], *_logged(trained.log_history, "eval_mean")],
            "options": json.loads(options.model_dump_json()) | {"resume": False},
        }
    }
    loss = after.loss()
    if options.teacher and loss:
        content["loss"] = loss.describe() | {"finetuned": True}
    return content


def as_perplexity(losses: WindowLosses) -> Perplexity:
    """Return the perplexity on held-out windows of texts.

    Raises:
        ActivationError: the loss is NaN or too large.
    """
    loss = losses.loss()
    assert loss is not None  # at least one window of the texts is held out
    return of_loss(loss.sliced, loss.tokens)


def _logged(history: list[dict[str, float]], name: str) -> list[list[float]]:
    """Return steps and their log entries; JSON has no NaN."""
    return [[int(h["step"]), h[name]] for h in history if name in h and math.isfinite(h[name])]
