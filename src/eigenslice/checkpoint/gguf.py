"""Reading the tensors of a GGUF file one at a time, dequantized, under transformers' names."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from eigenslice.errors import CheckpointError
from eigenslice.skeleton import empty_model


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file, and how."""

    kind: GGMLQuantizationType
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


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
        try:
            reader = GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
            self._stored = {
                t.name: _Stored(t.tensor_type, int(t.data_offset), tuple(t.data.shape), t.data.dtype)
                for t in reader.tensors
            }
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{path} is not a readable GGUF file ({type(error).__name__}: {error})",
                allowed="a complete GGUF file",
                next_step="download this file again",
            ) from error
        model = empty_model(config)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._parsed = {"config": config.to_dict()}
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._parsed["config"])
        self._mapping: dict[str, str] = get_gguf_hf_weights_map(
            _Named(model, ((model.base_model_prefix, model.base_model),)), self._processor
        )
        self._parts: dict[str, list[str]] = {}  # several tensors of the file may make one of the model
        for stored in self._stored:
            name = self._mapping.get(stored)
            if name is not None and name in self._shapes:
                self._parts.setdefault(name, []).append(stored)

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
            data = np.memmap(self.files[0], stored.dtype, "r", stored.offset, stored.shape)
            done = self._processor.process(
                weights=dequantize(data, stored.kind),
                name=part,
                tensor_key_mapping=self._mapping,
                parsed_parameters=self._parsed | {"tensors": tensors},
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
