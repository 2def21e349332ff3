"""Reading the tensors of a GGUF file one at a time, dequantized, under transformers' names."""

import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from eigenslice.checkpoint.check import check_gguf
from eigenslice.checkpoint.empty import empty_model
from eigenslice.checkpoint.gguf_header import GgufTensor
from eigenslice.checkpoint.gguf_reader import headers_read_once, stored_as, stored_numbers
from eigenslice.checkpoint.scan import Span
from eigenslice.checkpoint.sizes import check_total
from eigenslice.errors import CheckpointError, UnsupportedModelError, first_line

UNUSED = re.compile(r"^rope_|rope_freqs|\.attn_rot_embd|\.rotary_|^token_types")
"""Tensors that no model of transformers has: it computes them from the config."""


@contextmanager
def apart(folder: Path, gguf: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give the folder and, for a GGUF, the file for transformers' `from_pretrained`; the file has no neighbours.

    transformers would take a tokenizer.json, an adapter or a generation config beside the file. It would also prefer a
    file of the same name in the working directory.
    """
    if gguf is None:
        yield folder, {}
        return
    with tempfile.TemporaryDirectory(prefix="eigenslice-") as empty, headers_read_once():
        yield Path(empty), {"gguf_file": str((folder / gguf).absolute())}


def refuse_lost_rope_scaling(path: Path, config: Any) -> None:
    """Refuse a GGUF with a rotary scaling (Llama 3.1 and later) that transformers drops.

    Raises:
        UnsupportedModelError: the file has such a scaling.
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


def _unread(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers can't read {path} ({first_line(error)})",
        allowed="a GGUF of a type that transformers can dequantize",
        next_step="take the model's safetensors checkpoint",
    )


class _Named:
    """The attributes of a model that `get_gguf_hf_weights_map` reads. A real model has hundreds of submodules, and the
    same map would be built for each."""

    def __init__(self, model: Any, children: tuple[tuple[str, Any], ...] = ()) -> None:
        self.config, self.state_dict = model.config, model.state_dict
        self.named_children = lambda: [(name, _Named(child)) for name, child in children]


class GgufWeights:
    """Tensors of one GGUF file. transformers' own code changes their names and the order of rows.

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
        try:
            self._mapping: dict[str, str] = get_gguf_hf_weights_map(named, self._processor)
        except Exception as error:  # it knows fewer types than transformers has configs for
            raise _unread(path, error) from error
        self._parts: dict[str, list[str]] = {}  # several tensors of the file may make one of the model
        unknown = []
        for stored in self._stored:
            # Of experts, transformers maps the name without its suffix
            name = self._mapping.get(stored, self._mapping.get(stored.removesuffix(".weight")))
            if name is not None and name in self._shapes:
                self._parts.setdefault(name, []).append(stored)
            elif not UNUSED.search(stored):
                unknown.append(stored)
        if unknown:
            raise CheckpointError(
                f"{path} has {len(unknown)} unknown tensors ({', '.join(sorted(unknown)[:3])})",
                allowed=f"exactly the weights of transformers' {type(model).__name__}",
                next_step="take the model's safetensors checkpoint",
            )

        for name, parts in self._parts.items():
            self._check_shape(name, parts)

    def _check_shape(self, name: str, parts: list[str]) -> None:
        """Compare a parameter of the model with its tensors, by zeros that take no memory."""
        shape: Any = self._shapes[name]
        actual: Any
        if len(parts) == 1 and len(shape) < 3:  # of experts, transformers makes copies
            zeros = np.broadcast_to(np.float32(0), self._stored[parts[0]].shape)
            done = self._processed(name, parts[0], zeros, {})
            actual = self._stored[parts[0]].shape if done is None else done.shape
        else:
            actual, shape = sum(math.prod(self._stored[part].shape) for part in parts), math.prod(shape)
        if actual != shape:
            raise CheckpointError(
                f"{self.files[0]}: {parts[0]} is {actual}, the config says {shape}",
                allowed="weights that fit the config",
                next_step="convert or download the file again",
            )

    def _processed(self, name: str, part: str, data: np.ndarray, tensors: dict[str, Tensor]) -> np.ndarray | None:
        """Return a tensor's numbers as transformers processes them; None if it has put them into `tensors` itself.

        Raises:
            CheckpointError: transformers can't, for example because the numbers don't fit the number of heads.
        """
        try:
            done = self._processor.process(
                weights=data,
                name=part,
                tensor_key_mapping=self._mapping,
                parsed_parameters=self._parsed | {"tensors": tensors},
            )
        except Exception as error:  # whatever numpy says to shapes that don't fit
            raise _unread(self.files[0], error) from error
        return None if done.name is None else done.weights

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
            data = stored_numbers(self.files[0], stored)
            done = self._processed(name, part, dequantize(data, stored.kind), tensors)
            if done is not None:
                tensors[name] = torch.from_numpy(np.array(done, dtype=np.float32))
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
        """The places of the tensors in the file."""
        return [
            Span(name, t.shape, t.start, t.size, t.size // int(np.prod(t.shape[:-1], dtype=np.int64)), _decoder(t))
            for name, t in self._stored.items()
        ]


def _decoder(tensor: GgufTensor) -> Callable[[memoryview], Tensor]:
    """Makes numbers of rows of a tensor's bytes."""
    dtype, shape = stored_as(tensor)

    def decode(data: memoryview) -> Tensor:
        rows = np.frombuffer(data, dtype).reshape(-1, shape[-1])
        return torch.from_numpy(rows if dtype.kind == "f" else dequantize(rows, tensor.kind))

    return decode
