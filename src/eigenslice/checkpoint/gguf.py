"""Reading the tensors of a GGUF file one at a time, dequantized, under transformers' names."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from eigenslice.checkpoint.check import check_gguf
from eigenslice.checkpoint.gguf_header import GgufTensor
from eigenslice.checkpoint.scan import Span
from eigenslice.checkpoint.sizes import check_total
from eigenslice.errors import CheckpointError, UnsupportedModelError, first_line
from eigenslice.skeleton import empty_model

UNUSED = re.compile(r"^rope_|rope_freqs|\.attn_rot_embd|\.rotary_|^token_types")
"""Tensors that no model of transformers has: it computes them from the config."""


@contextmanager
def apart(folder: Path, gguf: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What transformers' `from_pretrained` is given: a folder and, for a GGUF, the file, without its neighbours.

    transformers would take a tokenizer.json, an adapter or a generation config that lies beside the file, and a file
    of the same name in the working directory instead.
    """
    if gguf is None:
        yield folder, {}
        return
    with tempfile.TemporaryDirectory(prefix="eigenslice-") as empty:
        yield Path(empty), {"gguf_file": str((folder / gguf).absolute())}


def refuse_lost_rope_scaling(path: Path, config: Any) -> None:
    """Refuse a GGUF whose rotary scaling (Llama 3.1 and later) transformers drops when it reads one.

    Raises:
        UnsupportedModelError: it is one.
    """
    header = check_gguf(path)
    factors = [name for name in header.tensors if name.startswith("rope_f")]
    fields = [name for name in header.fields if ".rope.scaling." in name]
    rope = getattr(config, "rope_parameters", None) or {}
    if (factors or fields) and rope.get("rope_type", "default") == "default":
        raise UnsupportedModelError(
            f"{path} scales its rotary angles ({', '.join([*factors, *fields][:3])}), which transformers loses when "
            "it reads a GGUF",
            allowed="GGUF files with plain rotary angles",
            next_step="take the model's safetensors checkpoint",
        )


def check_gguf_fits(path: Path, config: Any) -> None:
    """Refuse a GGUF that lacks tensors, or has some that transformers would drop without a word.

    Raises:
        CheckpointError: it does.
    """
    model = empty_model(config)
    if check_gguf(path).architecture not in GGUF_ARCHS:  # of the others, transformers tells
        check_total(str(path), sum(p.numel() for p in model.parameters()), check_gguf(path).numbers)
        GgufWeights(path, config)


def _stored_as(tensor: GgufTensor) -> tuple[np.dtype, tuple[int, ...]]:
    """What numpy reads a tensor's bytes as: its numbers, or rows of blocks."""
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if tensor.kind in plain:
        return np.dtype(plain[tensor.kind]), tensor.shape
    rows = tensor.shape[:-1]
    return np.dtype(np.uint8), (*rows, tensor.size // int(np.prod(rows, dtype=np.int64)))


class _Named:
    """As much of a model as `get_gguf_hf_weights_map` looks at, without its hundreds of submodules: it would build
    the same map for each."""

    def __init__(self, model: Any, children: tuple[tuple[str, Any], ...] = ()) -> None:
        self.config, self.state_dict = model.config, model.state_dict
        self.named_children = lambda: [(name, _Named(child)) for name, child in children]


class GgufWeights:
    """Tensors of one GGUF file. What transformers does to each (names, the order of rows) is its own code.

    Raises:
        CheckpointError: the file is broken.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self.files = (path,)
        header = check_gguf(path)
        self._stored = header.tensors
        model = empty_model(config)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._parsed = {"config": config.to_dict()}
        self._processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=self._parsed["config"])
        named: Any = _Named(model, ((model.base_model_prefix, model.base_model),))
        self._mapping = self._understood(path, lambda: get_gguf_hf_weights_map(named, self._processor))
        self._parts: dict[str, list[str]] = {}  # several tensors of the file may make one of the model
        for stored in self._stored:
            name = self._mapping.get(stored)
            if name is not None and name in self._shapes:
                self._parts.setdefault(name, []).append(stored)
        unknown = [name for name in self._stored if self._mapping.get(name) not in self._parts]
        unknown = sorted(name for name in unknown if not UNUSED.search(name))
        if unknown:
            raise CheckpointError(
                f"{path} has {len(unknown)} unknown tensors ({', '.join(unknown[:3])})",
                allowed=f"exactly the weights of transformers' {type(model).__name__}",
                next_step="take the model's safetensors checkpoint",
            )

    @staticmethod
    def _understood(path: Path, work: Callable[[], Any]) -> Any:
        """What transformers makes of a GGUF; whatever it raises says that it can't read the file."""
        try:
            return work()
        except Exception as error:  # for example reshape's, on shapes that don't fit the config
            raise CheckpointError(
                f"transformers can't read {path} ({first_line(error)})",
                allowed="a GGUF of a type that transformers can dequantize",
                next_step="take the model's safetensors checkpoint",
            ) from error

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return torch.float32

    def load(self, name: str) -> Tensor:
        """The tensor, dequantized to float32."""
        tensors: dict[str, Tensor] = {}
        for part in self._parts[name]:
            stored = self._stored[part]
            dtype, shape = _stored_as(stored)
            data = np.memmap(self.files[0], dtype, "r", stored.start, shape)
            done = self._understood(
                self.files[0],
                lambda part=part, data=data, stored=stored: self._processor.process(
                    weights=dequantize(data, stored.kind),
                    name=part,
                    tensor_key_mapping=self._mapping,
                    parsed_parameters=self._parsed | {"tensors": tensors},
                ),
            )
            if done.name is not None:  # otherwise the processor has put it into `tensors` itself
                tensors[name] = torch.from_numpy(np.array(done.weights, dtype=np.float32))
        tensor = tensors[name]
        if tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(
                f"{self.files[0]}: {name} is {tuple(tensor.shape)}, the config says {self._shapes[name]}",
                allowed="weights that fit the config",
                next_step="convert or download the file again",
            )
        return tensor

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """The tensor in pieces of so many rows; it is dequantized as a whole."""
        yield from self.load(name).split(count)

    def spans(self, file: Path) -> list[Span]:
        """Where the tensors lie in the file."""
        return [
            Span(name, t.shape, t.start, t.size, t.size // int(np.prod(t.shape[:-1], dtype=np.int64)), _decoder(t))
            for name, t in self._stored.items()
        ]


def _decoder(tensor: GgufTensor) -> Callable[[memoryview], Tensor]:
    """Makes numbers of rows of a tensor's bytes."""
    dtype, shape = _stored_as(tensor)

    def decode(data: memoryview) -> Tensor:
        rows = np.frombuffer(data, dtype).reshape(-1, shape[-1])
        return torch.from_numpy(rows if dtype.kind == "f" else dequantize(rows, tensor.kind))

    return decode
