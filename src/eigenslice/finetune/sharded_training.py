"""The training of a model whose weights are shared among the processes; see `sharding.py`.

transformers and accelerate share a model only on GPUs, and only when the training begins. Here it is shared before, so
that it can be measured, and on CPUs, too. So Trainer takes it as a model that is in its place already. Each process
writes its own part of a checkpoint. No process ever holds all weights and the optimizer.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from eigenslice.errors import CheckpointError
from eigenslice.finetune.sharding import local
from eigenslice.finetune.training import RecoveryTrainer
from eigenslice.runtime.offload import save_tensors

WEIGHTS, OPTIMIZER = "weights-{rank:05d}.safetensors", "optimizer-{rank:05d}.pt"
"""Files of a process's part of a checkpoint."""


class ShardedTrainer(RecoveryTrainer):
    """RecoveryTrainer of a model that `shard` has shared among the processes."""

    def __init__(self, *, args: TrainingArguments, **kwargs: Any) -> None:
        # Otherwise the gradients of all weights would wait whole for the last windows of a step
        accelerate: Any = args.accelerator_config
        accelerate.gradient_accumulation_kwargs = {"sync_each_batch": True}
        super().__init__(args=args, **kwargs)
        # Trainer's word for a model that places itself and sums its gradients by itself
        self.is_distributed_loading_by_transformers = True

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, without torch's warning of logits that are views: nothing here changes them in place."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            return super().compute_loss(*args, **kwargs)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """It is there."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write this process's part of the weights that are trained."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._trained(), folder / WEIGHTS.format(rank=self.args.process_index))

    def load(self, folder: Path) -> None:
        """Give the model the weights of a checkpoint."""
        path = folder / WEIGHTS.format(rank=self.args.process_index)
        stored, trained = load_file(path), self._trained()
        if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in trained.items()}:
            raise CheckpointError(
                f"{path} doesn't hold this process's part of the weights that are trained",
                allowed="checkpoints of this run, unchanged",
                next_step=f"remove {folder.parent.parent} to start anew",
            )
        for name, part in trained.items():
            part.copy_(stored[name])

    def _trained(self) -> dict[str, Tensor]:
        """This process's part of the weights that are trained, in the model's memory."""
        assert self.model is not None
        return {name: local(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write this process's part of the optimizer's state; Trainer would write the first one's alone."""
        optimizer, scheduler = self._optimizer_and_scheduler()
        folder, content = Path(output_dir), optimizer.state_dict()
        states = {n: {k: _part(v) for k, v in state.items()} for n, state in content["state"].items()}
        torch.save(content | {"state": states}, folder / OPTIMIZER.format(rank=self.args.process_index))
        if self.args.should_save:
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Go on with the optimizer's state of a checkpoint."""
        if checkpoint is None:
            return
        optimizer, scheduler = self._optimizer_and_scheduler()
        path = Path(checkpoint) / OPTIMIZER.format(rank=self.args.process_index)
        content = torch.load(path, map_location="cpu", weights_only=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = {n: {k: _shared(v, parameters[n]) for k, v in state.items()} for n, state in content["state"].items()}
        optimizer.load_state_dict(content | {"state": states})
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _optimizer_and_scheduler(self) -> tuple[Any, Any]:
        return self.optimizer, self.lr_scheduler


def _part(value: Any) -> Any:
    """This process's part of an entry of an optimizer's state; other entries, such as counts, are whole."""
    return local(value).clone() if isinstance(value, Tensor) else value


def _shared(value: Any, parameter: DTensor) -> Any:
    """An entry of an optimizer's state, shared as its parameter is if it has the shape of the parameter's part."""
    part = local(parameter)
    if not isinstance(value, Tensor) or value.shape != part.shape or not parameter.ndim:
        return value
    return DTensor.from_local(
        value.to(part.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
