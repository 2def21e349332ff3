"""Slicing, and healing of its result: all weights are trained to predict what the dense model predicts.

The sliced model is written to `OUTPUT.unhealed` first. This is a complete result, which the training reads as
`eigenslice finetune` would. It is removed when `OUTPUT` is there. So both steps are written whole or not at all, and
an interrupted run goes on in either.
"""

import shutil
from pathlib import Path
from typing import Any

from eigenslice import slicing
from eigenslice.errors import OptionsError
from eigenslice.options.finetuning import FinetuneOptions
from eigenslice.options.slicing import SliceOptions
from eigenslice.report.manifest import NAME, read_manifest
from eigenslice.runtime.device import resolve_device
from eigenslice.runtime.output import partial_path, unhealed_path
from eigenslice.runtime.progress import Progress, no_progress
from eigenslice.runtime.ranks import join_ranks
from eigenslice.runtime.run_file import differences
from eigenslice.runtime.work_folder import check_work_folder
from eigenslice.slicing import SliceResult

WINDOW = 512
"""Longest window that is trained on, in tokens. Many short steps recover more than a few long ones."""
FREE = {"output", "resume", "offload", "device"}
"""Options of slicing that the result doesn't depend on."""


def slice_model(options: SliceOptions, progress: Progress = no_progress) -> SliceResult:
    """Slice a checkpoint into a new folder, and heal the result if `heal` is given.

    Under torchrun, all processes call this; they share the sequences, and the first one writes.

    Args:
        options: The options of the command.
        progress: Called as the work goes on.

    Raises:
        EigensliceError: bad input or options; nothing has been written then.
        IncompleteError: the disk is full, or the like; finished work is kept.
    """
    if options.heal is None:
        return slicing.slice_model(options, progress)
    from eigenslice.finetune import finetune  # imports transformers' Trainer, which takes seconds

    unhealed = unhealed_path(options.output)
    training_options(options, unhealed)  # bad options end here
    with join_ranks(resolve_device(options.device)) as ranks:
        content = ranks.on_first(lambda: _begin(options, unhealed))
        if content is None:
            slicing.slice_model(options.model_copy(update={"heal": None, "output": unhealed}), progress)
            training = training_options(options, unhealed)
            content = finetune(training, progress if ranks.first else no_progress, options).manifest
            ranks.on_first(lambda: shutil.rmtree(unhealed))
    return SliceResult(options.output, content)


def training_options(options: SliceOptions, unhealed: Path) -> FinetuneOptions:
    """Return the options of the training.

    Args:
        options: The options of the command.
        unhealed: The folder of the sliced model.

    Raises:
        OptionsError: the training can't use the device.
    """
    device, _, number = (options.device or "").partition(":")
    if number not in ("", "0"):
        raise OptionsError(
            f"--device {options.device} with --heal",
            allowed="cpu or cuda with --heal: the training takes the first GPU that it sees",
            next_step=f"set CUDA_VISIBLE_DEVICES={number} and leave --device out",
        )
    text = options.calibration
    return FinetuneOptions(
        model=str(unhealed),
        output=options.output,
        teacher=options.model,
        tokens=options.heal,
        own_text=options.own_text,
        distill=1.0,
        data=text.model_copy(update={"seqlen": min(text.seqlen, WINDOW)}),
        device=device or None,  # pyright: ignore[reportArgumentType]: the field checks it
        shard_gib=options.shard_gib,
        resume=options.resume and (partial_path(options.output).exists() or options.output.exists()),
        trust_remote_code=options.trust_remote_code,
    )


def _begin(options: SliceOptions, unhealed: Path) -> dict[str, Any] | None:
    """Check both outputs before any work; return the manifest of a run that is complete already.

    Raises:
        OutputError: a name is taken, or another run is at work.
        OptionsError: the complete result was made with other options.
    """
    begun = unhealed.exists() or partial_path(unhealed).exists()
    content = read_manifest(options.output) if options.resume and not begun and options.output.is_dir() else None
    if content is None:
        if not (options.resume and (options.output / NAME).exists()):
            check_work_folder(options.output, options.resume, [Path(options.model)])
        if not (options.resume and unhealed.exists()):
            check_work_folder(unhealed, options.resume, [Path(options.model)])
        return None
    wanted = {name: value for name, value in options.model_dump(mode="json").items() if name not in FREE}
    made_with = {name: value for name, value in content["options"].items() if name not in FREE}
    different = sorted(differences(made_with, wanted))
    if different:
        raise OptionsError(
            f"{options.output} is complete, and was made with something else: " + "; ".join(different),
            allowed="--resume with the options that the run was begun with",
            next_step="choose another --output",
        )
    return content
