"""The precision of each kind of arithmetic in a run, chosen by the device. Nothing else decides about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch

Operands = Literal["float32", "tf32", "bfloat16"]
"""The format that a product of float32 matrices rounds its operands to; sums are in float32 in any case."""
Solving = Literal["float32", "float64"]
TORCH_NAMES: dict[Operands, str] = {"float32": "highest", "tf32": "high", "bfloat16": "medium"}
TF32_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with TF32 (Ampere)."""
BF16_FEATURES = ("amx_bf16", "avx512_bf16")
"""Features of CPUs that multiply bfloat16 and sum in float32."""


@dataclass(frozen=True)
class Precision:
    """The precision of a run's arithmetic.

    Eigenvectors are always those of float64 matrices, and sums over tokens are sums of chunks in float64: the small
    eigenvalues, by which directions are told apart, drown in anything less.

    Attributes:
        forward: Products of the forward pass, where it runs in float32.
        gram: Gram matrices and cross products of regressions.
        neurons: Products in the fit of the neurons' readers.
        solve: Cholesky factors. Where the measured condition forbids float32, float64 is used in any case.
    """

    forward: Operands = "float32"
    gram: Operands = "float32"
    neurons: Operands = "float32"
    solve: Solving = "float64"

    @property
    def solve_dtype(self) -> torch.dtype:
        """The dtype of Cholesky factors."""
        return getattr(torch, self.solve)

    def describe(self) -> dict[str, str]:
        """Return the choices, as the manifest has them."""
        return asdict(self) | {"eigenvectors": "float64"}


EXACT = Precision()
"""float32 products, and float64 for everything that is solved."""
ON_TENSOR_CORES = Precision(gram="tf32", neurons="tf32", solve="float32")
"""For GPUs. The forward pass has a dtype of its own there. float64 is slow: 64 times slower than float32 on consumer
GPUs."""
ON_BF16_CPU = Precision("bfloat16", "bfloat16", "bfloat16", "float64")
"""For CPUs that multiply bfloat16: the tables in docs/results.md were made with such products."""


def choose_precision(device: torch.device, compute: str | None = None) -> Precision:
    """Return the precision for a device.

    Args:
        device: The device.
        compute: The dtype that the user asks to compute in, None if none is named. "float32" on a CPU means float32
            products on every CPU.
    """
    if device.type == "cuda":
        has_tf32 = not torch.version.hip and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
        return ON_TENSOR_CORES if has_tf32 else Precision(solve="float32")
    if device.type == "cpu" and compute != "float32":
        features = torch.cpu.get_capabilities()
        if any(features.get(name, False) for name in BF16_FEATURES):
            return ON_BF16_CPU
    return EXACT


@contextmanager
def products(operands: Operands) -> Iterator[None]:
    """Let products of float32 matrices round their operands so, where the device can; of the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(TORCH_NAMES[operands])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
