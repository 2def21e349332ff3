"""Models whose weights are shared among the processes (FSDP2): each process holds a part of every tensor.

A process gathers the weights of a block when the block runs, and frees them afterwards. Gradients are summed and parted
in the same way. So the weights, their gradients and the optimizer take 1/n of the memory on each of n devices. The
parts may also lie on the host, where the optimizer then runs. One process alone can do this, too: its part is the
whole, and its device holds no more than a few blocks.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eigenslice.runtime.ranks import Ranks

LAUNCHER = "ACCELERATE_USE_FSDP"
"""Variable that `accelerate launch --use_fsdp` sets."""
ADAPTED, BASE = "base_model.model.", ".base_layer."
"""Parts of names that peft adds to those of a model's own weights."""


@contextmanager
def own_sharding() -> Iterator[bool]:
    """Whether `accelerate launch --use_fsdp` started this process; inside, accelerate and transformers don't know it.

    They would share the model on GPUs only, later than here, and load the weights in one process alone.
    """
    asked = os.environ.pop(LAUNCHER, None)
    try:
        yield (asked or "false").lower() == "true"
    finally:
        if asked is not None:
            os.environ[LAUNCHER] = asked


def make_mesh(ranks: Ranks) -> DeviceMesh:
    """The processes as torch's sharding sees them; all of them call this."""
    return init_device_mesh(ranks.device.type, (ranks.size,))


def shard(model: Any, mesh: DeviceMesh, *, bfloat16: bool = False, on_host: bool = False) -> Any:
    """Keep this process's part of each weight, on the mesh's device or on the host. Nobody waits for another one here.

    The blocks are gathered one by one; what is outside of them (the vocabulary's matrices) during a whole pass.

    Args:
        model: The model on the CPU, whole.
        mesh: The processes.
        bfloat16: Gather and compute in bfloat16. The parts stay as they are, and gradients are summed in float32.
        on_host: Keep the parts on the host, and the gradients and the optimizer with them.
    """
    kind = torch.bfloat16 if bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32 if bfloat16 else None)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if on_host else OffloadPolicy()
    ways: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload, "reshard_after_forward": True}
    for block in blocks(model):
        fully_shard(block, **ways)
    return fully_shard(model, **ways)


def blocks(model: Any) -> list[nn.Module]:
    """The blocks of a model, stock or custom, adapted or not: the list of modules with the most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=nn.ModuleList()))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; a tensor that isn't shared is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def without_weights(model: Any) -> Any:
    """A copy of a model with its weights on the meta device, tied as they are."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def gather(model: Any, skeleton: Any) -> None:
    """Give the weights of a shared model to a copy of it without weights, on the CPU; all processes call this.

    Args:
        model: The shared model.
        skeleton: The answer of `without_weights` before the model was shared; None in processes that want no copy.
    """
    targets = None if skeleton is None else dict(skeleton.named_parameters())
    for name, parameter in model.named_parameters():
        whole = parameter.detach().full_tensor()
        if targets is not None:
            # The parameter becomes another tensor, but stays the object that tied modules refer to
            torch.utils.swap_tensors(targets[name], nn.Parameter(whole.cpu().clone(), parameter.requires_grad))


def scatter(model: Any, merged: Any, ranks: Ranks) -> None:
    """Give merged weights to a shared model, whose adapters then add nothing; all processes call this.

    Args:
        model: The shared model, maybe with adapters.
        merged: The first process's model without adapters, on the CPU; None in others.
        ranks: The processes.
    """
    weights = {} if merged is None else dict(merged.named_parameters())
    adapted = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        part = local(parameter.detach())
        if adapted and parameter.requires_grad:
            part.zero_()
            continue
        whole = torch.empty(parameter.shape, dtype=torch.float32, device=ranks.device)
        if ranks.first:
            whole.copy_(weights[name.removeprefix(ADAPTED).replace(BASE, ".")].detach())
        part.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local())
