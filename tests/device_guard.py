"""Shows on CPUs which tensors of a run would not be on its strategy's device, and keeps them from collectives.

NCCL takes no CPU tensor, and gloo takes any. Within `device_guard` the strategy's devices are called `cpu:0`, and the
plain `cpu` is the host, so that both can be distinguished although their memory is the same. Tensors of the host are
those that a factory made without `device` or with `cpu`, those of a checkpoint, and what is computed from them alone.
A tensor that is sent from one to the other is copied, as it would be on a GPU. A group that is made for gloo by name
is one for tensors of the host, on GPUs too.

It is the storage that is marked, and with it every view, parameter and buffer.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

DEVICE = torch.device("cpu", 0)
"""The strategy's device."""

HOST = torch.device("cpu")
"""The host, which is only called so."""

TORCH = f"{Path(torch.__file__).parent}/"
"""The files of torch, which takes a device from a tensor, a group or a mesh in C++, where `cpu` has no number."""

MODULE = f"{TORCH}nn/modules/module.py"
"""The file of torch that is handed a device: `to` and `to_empty` of a module."""

COLLECTIVES = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd")
"""The namespaces of collectives in torch's dispatcher."""


class HostTensorError(RuntimeError):
    """A collective was handed a tensor of the host."""


@contextmanager
def device_guard() -> Iterator[list[str]]:
    """A context in which a collective raises `HostTensorError` for a tensor of the host.

    It yields the names of the collectives that were called.
    """
    marks = _Marks()
    called: list[str] = []

    def devices(count: int) -> list[torch.device]:
        return [DEVICE] * int(count)

    of_host: set[str] = set()
    new_group = dist.new_group

    def noted(*args: Any, **options: Any) -> Any:
        group = new_group(*args, **options)
        if options.get("backend") == "gloo":
            of_host.add(group.group_name)
        return group

    groups = patch.object(dist, "new_group", noted)
    lightning = patch.object(CPUAccelerator, "get_parallel_devices", staticmethod(devices))
    files = patch("torch.load", marks.marking(torch.load, "a file"))
    arrays = patch("torch.from_numpy", marks.marking(torch.from_numpy, "numpy"))
    with lightning, files, arrays, groups, _Collectives(marks, called, of_host), _Places(marks):
        yield called


class _Marks:
    """Which storages belong to the host, and where they were made."""

    def __init__(self) -> None:
        self.places: dict[int, tuple[StorageWeakRef, str]] = {}

    def of(self, tensor: Tensor) -> str | None:
        """Where a tensor of the host was made; None: it is on the device."""
        for storage in _storages(tensor):
            mark = self.places.get(storage._cdata)
            if mark is not None:
                return mark[1]
        return None

    def of_all(self, tensors: list[Tensor]) -> str | None:
        """Where the first of some tensors was made if all are of the host; else None."""
        places = []
        for tensor in tensors:
            place = self.of(tensor)
            if place is None:
                return None
            places.append(place)
        return places[0]

    def marking(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        """A function that modes do not see, with the tensors that it returns marked as the host's."""

        def marked(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            for tensor in _tensors([result]):
                self.set(tensor, place)
            return result

        return marked

    def set(self, tensor: Tensor, place: str | None) -> None:
        """Marks a tensor as one of the host or, without a place, as one of the device."""
        for storage in _storages(tensor):
            if place is None:
                self.places.pop(storage._cdata, None)
            else:
                # A weak reference keeps the address from being used again.
                self.places[storage._cdata] = (StorageWeakRef(storage), place)


class _Places(TorchFunctionMode):
    """Marks the results of torch's functions."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func == Tensor.device.__get__:
            of_device = result.type == "cpu" and self.marks.of(args[0]) is None
            return DEVICE if of_device else result
        if not isinstance(result, Tensor | list | tuple):
            return result
        given = [*_tensors(args), *_tensors(kwargs.values())]
        asked = _asked_device(func, args, kwargs)
        if isinstance(asked, Tensor):
            return self._placed(result, given, self.marks.of(asked), moves=True)
        if asked is not None:
            place = _host_line(asked, sys._getframe(1))
            return self._placed(result, given, place, moves=True)
        place = self.marks.of_all(given) if given else _line(sys._getframe(1))
        if place is None:
            return result
        return self._placed(result, given, place, moves=False)

    def _placed(self, result: Any, given: list[Tensor], place: str | None, *, moves: bool) -> Any:
        """The result with its new tensors marked; one that is sent elsewhere becomes a copy."""
        before = {storage._cdata for tensor in given for storage in _storages(tensor)}

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.device.type != "cpu":
                return leaf
            is_new = all(storage._cdata not in before for storage in _storages(leaf))
            is_sent = moves and (self.marks.of(leaf) is None) != (place is None)
            if not is_new and is_sent:
                leaf = leaf.clone()
            if is_new or is_sent:
                self.marks.set(leaf, place)
            return leaf

        if isinstance(result, Tensor):
            return placed(result)
        return tree_map(placed, result)


class _Collectives(TorchDispatchMode):
    """Raises `HostTensorError` for a collective with a tensor of the host, unless its group is made for those."""

    def __init__(self, marks: _Marks, called: list[str], of_host: set[str]) -> None:
        super().__init__()
        self.marks = marks
        self.called = called
        self.of_host = of_host

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in COLLECTIVES and not self._is_of_host(args):
            self.called.append(func.name())
            for tensor in [*_tensors(args), *_tensors(kwargs.values())]:
                place = self.marks.of(tensor)
                if place is not None:
                    raise HostTensorError(f"{func.name()}: a tensor of the host, made in {place}")
        # What torch itself makes in C++ is where its inputs are.
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def _is_of_host(self, args: tuple[Any, ...]) -> bool:
        """Whether the group of a collective takes tensors of the host."""
        for argument in args:
            if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
                return dist.ProcessGroup.unbox(argument).group_name in self.of_host
        return False


def _asked_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The device that a call names, or the tensor whose device it asks for; None if it names none."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if func == Tensor.cpu:
        return HOST
    if func != Tensor.to:
        return None
    for argument in (*args[1:], kwargs.get("other")):
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, torch.device | str):
            return torch.device(argument)
    return None


def _host_line(device: torch.device, caller: FrameType) -> str | None:
    """The line that names the host as a device; None for another device."""
    file = caller.f_code.co_filename
    if device != HOST or (file.startswith(TORCH) and file != MODULE):
        return None
    return _line(caller)


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _storages(tensor: Tensor) -> list[Any]:
    """The storages of a tensor, or of the tensors within it."""
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in inner]  # a mesh may be among them
        return [storage for part in _tensors(parts) for storage in _storages(part)]
    try:
        return [tensor.untyped_storage()]
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return []
