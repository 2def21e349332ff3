"""Emulated hardware that rounds the operands of float32 products as torch's setting says, and sums in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MATRICES: dict[Any, tuple[int, int]] = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
}
"""Products, and which of their arguments are the operands."""
TF32_BITS = 10
"""Bits of TF32's fraction; float32 has 23."""


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers to TF32, half away from zero."""
    dropped = 23 - TF32_BITS
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


def to_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers to bfloat16."""
    return tensor.bfloat16().float()


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"high": to_tf32, "medium": to_bfloat16}


class TensorCores(TorchDispatchMode):
    """The hardware, for this thread.

    Attributes:
        used: The settings that float32 products had.
        solved: The dtypes of Cholesky factors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.solved: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.linalg_cholesky_ex:  # into a tensor of its own, or in place
            self.solved.add(args[0].dtype)
        places = MATRICES.get(func, ())
        if places and args[places[0]].dtype == torch.float32:
            setting = torch.get_float32_matmul_precision()
            self.used.add(setting)
            round_ = ROUNDED.get(setting, lambda tensor: tensor)
            args = [round_(arg) if place in places else arg for place, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))
