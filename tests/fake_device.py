"""An emulated GPU: it computes on the CPU, refuses the CPU's tensors as CUDA does, and counts what crosses the bus.

A tensor on the device is a tensor of the CPU whose class says otherwise. Every call of torch passes one function here,
which compares the places of the arguments. torch's own code for CUDA can't be tested so; ours can.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

TOTAL = 2**34
"""Bytes of the device's memory."""
SEEN = 20
"""Number of calls after which memory is counted."""
DEVICE, IS_CUDA, IS_CPU = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
PARSE: Any = torch._C._nn._parse_to  # pyright: ignore[reportAttributeAccessIssue]
TO = torch.Tensor.to
SET_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "is_nonzero", "equal", "allclose"}
"""Functions whose answer Python waits for: bytes come back to the host."""
ANYWHERE = {"_has_compatible_shallow_copy_type", "is_same_size", "result_type"}
"""Functions that read no numbers."""
NO_SCALARS = {"cat", "concat", "stack", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "linear", "embedding"} | {
    *("gather", "scatter", "scatter_", "index_select", "index_copy", "index_copy_", "index_add", "index_add_"),
    *("masked_select", "searchsorted", "cholesky_solve", "scaled_dot_product_attention"),
}
"""Functions that refuse even single numbers of the CPU; others take them as they take Python's numbers."""


class DeviceTensor(torch.Tensor):
    """A tensor on the device."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True) -> Any:
        """Make a parameter, as who calls the class of a parameter means."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass a call on where no mode is active, such as in another thread."""
        return _current().call(func, args, kwargs or {})


class Gpu(TorchFunctionMode):
    """The device.

    Attributes:
        device: Its name.
        total: Bytes of its memory.
        to_device, to_host: Bytes that crossed the bus.
        emptied: How often cached memory was given back.
        at_resets: Bytes in use whenever the peak was reset.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.device, self.total = torch.device("cuda", index), TOTAL
        self.to_device = self.to_host = self.emptied = 0
        self.at_resets: list[int] = []
        self._peak = self._calls = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._lock = threading.Lock()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    @property
    def allocated(self) -> int:
        """Bytes of all tensors on the device."""
        with self._lock:
            self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
            now = sum(size for _, size in self._storages.values())
            self._peak = max(self._peak, now)
            return now

    @property
    def peak(self) -> int:
        """Most bytes since the peak was reset, as far as `SEEN` calls see them."""
        return max(self.allocated, self._peak)

    def reset_peak(self, device: Any = None) -> None:
        """Begin with the bytes that are in use now."""
        self._peak = 0
        self.at_resets.append(self.allocated)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what torch would do with these arguments."""
        name = func.__name__
        tensors = _tensors((*args, *kwargs.values()))
        here = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if func in (DEVICE, IS_CUDA, IS_CPU):
            return {DEVICE: self.device, IS_CUDA: True, IS_CPU: False}[func] if here else _plainly(func, args, {})
        if func is torch.device:
            return _device(*args, **kwargs)
        if func == SET_DATA:
            return self._set_data(*args)
        if name in ("to", "cpu", "cuda") and tensors and args[0] is tensors[0]:
            return self._to(name, args, kwargs)
        if name == "copy_" or (name == "__setitem__" and not _tensors(args[1:2])):
            return self._copied(func, args, kwargs)
        target = kwargs.get("device")
        if target is not None:
            kwargs = kwargs | {"device": "cpu" if self._is_mine(target) else target}
            if self._is_mine(target) and kwargs.get("generator") is not None:
                raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {self.device}")
        if name in ("numpy", "__array__") and here:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        if here and name not in ANYWHERE:
            _refuse_mixed(name, args, tensors)
        result = _plainly(func, args, kwargs)
        if name in READS:
            self.to_host += sum(t.nbytes for t in tensors) if here and name == "tolist" else 8 * here
        mine = here if target is None else self._is_mine(target)
        return self._marked(result) if mine else _unmarked(result)

    def to_from_any_thread(self) -> Callable[..., Any]:
        """Return `Tensor.to`. A mode is of one thread, and transformers loads weights in others."""

        def to(*args: Any, **options: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return self.call(TO, args, options)

        return to

    def _is_mine(self, device: Any) -> bool:
        return _device(device).type == "cuda"

    def _set_data(self, tensor: Any, value: Any) -> None:
        """`parameter.data = value`, by which modules move: the parameter then is where the value is."""
        _plainly(SET_DATA, (tensor, value), {})
        _placed(tensor, here=isinstance(value, DeviceTensor))

    def _to(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`tensor.to`, `.cpu`, `.cuda`. As in CUDA, numbers that go to the device are converted on the host."""
        tensor, *rest = args
        was = isinstance(tensor, DeviceTensor)
        if name != "to":
            becomes, dtype, copy = name == "cuda", tensor.dtype, False
        else:
            kwargs = dict(kwargs)
            copy = bool(kwargs.pop("copy", False))
            other = rest[0] if rest else kwargs.get("other")
            if isinstance(other, torch.Tensor):
                becomes, dtype = isinstance(other, DeviceTensor), other.dtype
            else:
                rest = [_device(part) if type(part) is int else part for part in rest]
                kwargs = {key: _device(value) if type(value) is int else value for key, value in kwargs.items()}
                device, dtype, *_ = PARSE(*rest, **kwargs)
                if device is not None and device.type == "meta":
                    return _unmarked(_plainly(TO, args, kwargs))
                becomes = was if device is None else self._is_mine(device)
                dtype = dtype or tensor.dtype
        result = _plainly(TO, (tensor,), {"dtype": dtype, "copy": copy or was != becomes})
        if becomes and not was:
            self.to_device += result.nbytes
        elif was and not becomes:
            self.to_host += tensor.nbytes
        return self._marked(result) if becomes else _unmarked(result)

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy from anywhere to anywhere."""
        target, source = args[0], args[-1]
        if isinstance(source, torch.Tensor) and isinstance(target, DeviceTensor) != isinstance(source, DeviceTensor):
            if isinstance(target, DeviceTensor):
                self.to_device += source.numel() * target.element_size()
            else:
                self.to_host += source.nbytes
        result = _plainly(func, args, kwargs)
        return result if result is None else target

    def _marked(self, value: Any) -> Any:
        """Tensors, and those in lists, on the device."""
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                return value
            storage = value.untyped_storage()
            with self._lock:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._calls += 1
            if self._calls % SEEN == 0:
                _ = self.allocated
            return _placed(value, here=True)
        return _mapped(self._marked, value)


ACTIVE: list[Gpu] = []
"""The device of this process, while there is one."""


def _current() -> Gpu:
    return ACTIVE[-1]


def _device(*args: Any, **kwargs: Any) -> torch.device:
    """torch's device of a name or, for a number, of the GPU with it."""
    number = args[0] if args else kwargs.get("device")
    return torch.device("cuda", number) if type(number) is int else _plainly(torch.device, args, kwargs)


def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _placed(tensor: Any, here: bool) -> Any:
    """The same tensor, on the device or not; a view of it would be no leaf for autograd."""
    if isinstance(tensor, DeviceTensor) != here:
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        tensor.__class__ = DeviceTensor if here else torch.nn.Parameter if is_parameter else torch.Tensor
        if here and is_parameter:
            tensor._is_param = True
    return tensor


def _unmarked(value: Any) -> Any:
    return _placed(value, here=False) if isinstance(value, torch.Tensor) else _mapped(_unmarked, value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple) and type(value) is not tuple:
        changed = list(map(change, value))
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map(change, value))
    return value


def _tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _refuse_mixed(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Refuse arguments in two places, but single numbers of the CPU, and indices of the CPU in a tensor here."""
    if name in ("__getitem__", "__setitem__") and isinstance(args[0], DeviceTensor):
        tensors = _tensors(args[2:])
    with torch._C.DisableTorchFunction():
        for tensor in tensors:
            away = not isinstance(tensor, DeviceTensor) and tensor.device.type == "cpu"
            if away and (tensor.dim() or name in NO_SCALARS):
                shape = tuple(tensor.shape)
                raise RuntimeError(f"{name}: expected all tensors on one device, but {shape} is on the CPU")


@contextmanager
def fake_device(index: int = 0) -> Iterator[Gpu]:
    """Give this process a device `cuda`, in this thread, for as long as the context lasts."""
    gpu = Gpu(index)

    def emptied() -> None:
        gpu.emptied += 1

    functions = {
        "mem_get_info": lambda device=None: (gpu.total - gpu.allocated, gpu.total),
        "memory_allocated": lambda device=None: gpu.allocated,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "memory_reserved": lambda device=None: gpu.allocated,
        "reset_peak_memory_stats": gpu.reset_peak,
        "empty_cache": emptied,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "emulated",
        "is_initialized": lambda: True,
        "current_device": lambda: index,
        "device_count": lambda: index + 1,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    ACTIVE.append(gpu)
    try:
        with ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(patch.object(torch.cuda, name, function))
            stack.enter_context(patch.object(torch.Tensor, "to", gpu.to_from_any_thread()))
            stack.enter_context(gpu)
            yield gpu
    finally:
        ACTIVE.pop()
