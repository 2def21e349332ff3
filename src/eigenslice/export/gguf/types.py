"""Number formats of GGUF matrices: which one a row length allows, and turning numbers into it.

Blocked formats hold rows of whole blocks: 32 numbers (q4_0 to q8_0) or 256 (the K-quants). A type is refused where the
hidden width isn't a multiple, since most matrices would miss it. Single matrices with other rows (o_proj:
heads x head_dim; down_proj: MLP neurons) take a larger type, by the rule of llama.cpp's own llama-quantize.

The `gguf` package quantizes everything but K-quants. These are computed by ggml itself, by `ggml_quantize_chunk` in the
library that xllamacpp ships: one C function that takes plain numbers and pointers.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from numpy.typing import NDArray

from eigenslice.errors import OptionsError

Q = GGMLQuantizationType
K_BLOCK = 256


@dataclass(frozen=True)
class GgufType:
    """A type that the user can ask for.

    Attributes:
        matrices: Format of the blocks' matrices.
        embedding: Format of the token embedding and the head, which lose most.
        file_type: Type in the file's header.
        fallback: Format of matrices without whole blocks in a row, if it fits; otherwise float16.
        tolerance: Mean difference of log-probability, in nats, that llama.cpp's arithmetic may make.
    """

    matrices: GGMLQuantizationType
    embedding: GGMLQuantizationType
    file_type: LlamaFileType
    fallback: GGMLQuantizationType = Q.F16
    tolerance: float = 0.5

    @property
    def block(self) -> int:
        """Numbers in a block."""
        return GGML_QUANT_SIZES[self.matrices][0]


F = LlamaFileType
# llama.cpp rounds activations, too: to float16 or bfloat16, or to 8 bits in blocks of 32 (of 256 with K-quants).
# Measured on SmolLM2-135M, dense and at width 512: f32 0.001, f16 0.003, bf16 0.02, q8_0 and q4_0 0.1, K-quants 0.3.
TYPES: dict[str, GgufType] = {
    "f32": GgufType(Q.F32, Q.F32, F.ALL_F32, tolerance=0.01),
    "f16": GgufType(Q.F16, Q.F16, F.MOSTLY_F16, tolerance=0.03),
    "bf16": GgufType(Q.BF16, Q.BF16, F.MOSTLY_BF16, tolerance=0.15),
    "q8_0": GgufType(Q.Q8_0, Q.Q8_0, F.MOSTLY_Q8_0),
    "q5_1": GgufType(Q.Q5_1, Q.Q8_0, F.MOSTLY_Q5_1),
    "q5_0": GgufType(Q.Q5_0, Q.Q8_0, F.MOSTLY_Q5_0),
    "q4_1": GgufType(Q.Q4_1, Q.Q8_0, F.MOSTLY_Q4_1),
    "q4_0": GgufType(Q.Q4_0, Q.Q8_0, F.MOSTLY_Q4_0),
    "q6_k": GgufType(Q.Q6_K, Q.Q6_K, F.MOSTLY_Q6_K, Q.Q8_0, tolerance=1.0),
    "q5_k": GgufType(Q.Q5_K, Q.Q6_K, F.MOSTLY_Q5_K_S, Q.Q5_1, tolerance=1.0),
    "q4_k": GgufType(Q.Q4_K, Q.Q6_K, F.MOSTLY_Q4_K_S, Q.Q5_0, tolerance=1.0),
}


def type_for(name: str, width: int) -> GgufType:
    """The type of this name, for a model of this hidden width.

    Raises:
        OptionsError: there is none, the width isn't a multiple of its block, or it needs a runtime that isn't there.
    """
    fitting = [n for n, kind in TYPES.items() if width % kind.block == 0]
    if name not in TYPES:
        raise OptionsError(
            f"--type {name}",
            allowed=f"for hidden width {width}: " + ", ".join(fitting),
            next_step="choose one of these",
        )
    if name not in fitting:
        block = TYPES[name].block
        wide_enough = f", or slice with --width {width // block * block}" if width > block else ""
        raise OptionsError(
            f"--type {name} holds rows of {block} numbers; the model's hidden width {width} is no multiple",
            allowed=f"for hidden width {width}: " + ", ".join(fitting),
            next_step="choose one of these" + wide_enough,
        )
    if TYPES[name].block == K_BLOCK:
        _ggml_quantizer()
    return TYPES[name]


OUTER = ("embed_tokens", "lm_head")
ROUTERS = ("gate", "shared_expert_gate")


def format_of(kind: GgufType, shape: tuple[int, ...], name: str) -> GGMLQuantizationType:
    """Format of a tensor: the type's own or, where rows aren't whole blocks, a larger one.

    Vectors and routers take float32, as in llama.cpp's own llama-quantize.

    Args:
        kind: The type that the user asked for.
        shape: Shape of the tensor.
        name: transformers' name of the tensor.
    """
    module = name.split(".")[-2]
    if len(shape) == 1 or module in ROUTERS:
        return Q.F32
    embedding = module in OUTER
    for candidate in (kind.embedding if embedding else kind.matrices, kind.fallback):
        if shape[-1] % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Q.F16


def stored_shape(shape: tuple[int, ...], format_: GGMLQuantizationType) -> tuple[int, ...]:
    """Shape of a tensor as the writer wants it: in bytes where numbers are packed."""
    if format_ in (Q.F32, Q.F16):
        return shape
    block, size = GGML_QUANT_SIZES[format_]
    return (*shape[:-1], shape[-1] // block * size)


def stored_dtype(format_: GGMLQuantizationType) -> Any:
    """Return numpy's dtype of the result of `encode`."""
    return {Q.F32: np.float32, Q.F16: np.float16}.get(format_, np.uint8)


def encode(values: NDArray[np.float32], format_: GGMLQuantizationType) -> NDArray[Any]:
    """Numbers (..., columns) in a format; shape and dtype are `stored_shape` and `stored_dtype`."""
    if GGML_QUANT_SIZES[format_][0] < K_BLOCK:
        return quants.quantize(values, format_)
    columns = values.shape[-1]
    rows = values.size // columns
    values = np.ascontiguousarray(values)
    packed = np.zeros(stored_shape(values.shape, format_), dtype=np.uint8)
    written = _ggml_quantizer()(int(format_), values.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    if written != packed.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes, {packed.nbytes} were expected")
    return packed


def round_weights(model: Any, kind: GgufType) -> None:
    """Give a model of transformers the numbers that a GGUF of this type holds, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            format_ = format_of(kind, tuple(parameter.shape), name)
            if format_ != Q.F32:
                packed = encode(parameter.float().cpu().numpy(), format_)
                parameter.copy_(torch.from_numpy(quants.dequantize(packed, format_)))


@cache
def _ggml_quantizer() -> Callable[..., int]:
    """ggml's `ggml_quantize_chunk(type, float *src, void *dst, start, rows, row_length, imatrix) -> bytes`."""
    try:
        import xllamacpp.xllamacpp as library

        function = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        raise OptionsError(
            f"K-quants are computed by ggml, and no library with it was found ({type(error).__name__}: {error})",
            allowed="K-quants with xllamacpp installed (on Linux and macOS); the other types without it",
            next_step="pip install 'eigenslice[gguf]', or export --type f16 and run llama.cpp's llama-quantize on it",
        ) from error
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    function.restype = ctypes.c_size_t
    return function
