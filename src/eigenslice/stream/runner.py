"""Running one decoder layer: transformers' own modules, with the weights of a block."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from eigenslice.arch import Sublayer
from eigenslice.modeling import SlicedConfig, SlicedForCausalLM
from eigenslice.runtime.device import moved


class _AllCapturedError(Exception):
    """Ends a forward pass of which nothing more is needed."""


@contextmanager
def captured_inputs(layer: nn.Module, modules: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Any]]:
    """Give a dictionary for the inputs of these modules. Calls inside the context fill it.

    A module with several arguments has all of them (experts: tokens, numbers of their experts, and weights).

    Args:
        layer: A decoder layer.
        modules: Names of modules of the layer.
        stop: True to leave the context as soon as all inputs are known; outputs aren't computed then.
    """
    inputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0] if len(args) == 1 else args
            if stop and len(inputs) == len(modules):
                raise _AllCapturedError

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    try:
        yield inputs
    except _AllCapturedError:
        pass
    finally:
        for handle in handles:
            handle.remove()


class CallRecorder(nn.Module):
    """A stand-in for a decoder layer that keeps the arguments of its call, by name."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.hidden: Tensor | None = None
        self._arguments, self._gives_tuple = layer.arguments, layer.gives_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.kwargs = hidden_states, kwargs | dict(zip(self._arguments, args, strict=False))
        return (hidden_states, None) if self._gives_tuple else hidden_states


def has_module(layer: nn.Module, name: str) -> bool:
    """Return whether a decoder layer has a module of this name: layers of one model may differ."""
    return any(name == module for module, _ in layer.named_modules())


def has_experts(layer: nn.Module, sublayer: Sublayer) -> bool:
    """Return whether a decoder layer has a sublayer's experts: in some models, only some layers are mixtures."""
    return has_module(layer, sublayer.experts)


class BlockRunner:
    """A model of the custom class without weights. Layers get weights for as long as they run."""

    def __init__(self, config: SlicedConfig, layers: str, device: torch.device, dtype: torch.dtype) -> None:
        """Make the model, without weights.

        Args:
            config: The config of the custom class.
            layers: Name of the model's list of decoder layers.
            device: The device that layers run on.
            dtype: The dtype that layers run in.
        """
        self.device, self.dtype = device, dtype
        with init_empty_weights(include_buffers=False), no_init_weights():
            self._whole: Any = SlicedForCausalLM(config).eval()
        self._whole.model.set_experts_implementation("eager")  # others want sizes that are multiples of something
        for module in self._whole.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.model: Any = self._whole.model
        self.layers: Any = self.model.get_submodule(layers)

    def assign(self, module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Give a module weights, by name."""
        for name, tensor in tensors:
            parent, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(moved(tensor, self.device, self.dtype), requires_grad=False)
            setattr(module.get_submodule(parent), leaf, parameter)

    def release(self, module: nn.Module) -> None:
        """Take a module's weights away."""
        for parent in module.modules():
            for leaf, parameter in parent._parameters.items():
                if parameter is not None:
                    parent._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
